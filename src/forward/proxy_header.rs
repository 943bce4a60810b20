//! The header of the PROXY protocol, version 2, at the start of a connection to a backend: whom the requests on it are from.
//! Pure: who gets it, and that nobody else's request follows on the connection, is the lane's business.

use std::net::IpAddr;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and that the connection is a client's.
const PROXY: u8 = 0x21;

/// For a connection of tollgate's own, like a check (LOCAL).
pub const PROXY_LOCAL: [u8; 16] = *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// For a connection that carries a client's request. Only the client's address is known of a client behind other proxies, so its
/// port and the address that it connected to are 0 for all. `None`: it has no address, behind a Unix socket.
pub fn proxy_header(client: Option<IpAddr>) -> Vec<u8> {
    let mut header = Vec::with_capacity(52);
    header.extend_from_slice(SIGNATURE);
    header.push(PROXY);
    match client {
        // TCP over IPv4, over IPv6: source, destination, and their ports.
        Some(IpAddr::V4(address)) => {
            header.extend_from_slice(&[0x11, 0, 12]);
            header.extend_from_slice(&address.octets());
            header.extend_from_slice(&[0; 4 + 2 + 2]);
        }
        Some(IpAddr::V6(address)) => {
            header.extend_from_slice(&[0x21, 0, 36]);
            header.extend_from_slice(&address.octets());
            header.extend_from_slice(&[0; 16 + 2 + 2]);
        }
        // Unspecified.
        None => header.extend_from_slice(&[0x00, 0, 0]),
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte for byte as the specification has it.
    #[test]
    fn headers_are_as_the_specification_says() {
        let v4 = proxy_header(Some("192.0.2.7".parse().unwrap()));
        assert_eq!(v4, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\0\0\0\0\0\0\0\0");
        let v6 = proxy_header(Some("2001:db8::7".parse().unwrap()));
        assert_eq!((v6.len(), &v6[12..16]), (16 + 36, &b"\x21\x21\0\x24"[..]));
        assert_eq!(v6[16..32], "2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
        assert!(v6[32..].iter().all(|byte| *byte == 0));
        assert_eq!(proxy_header(None), b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\0");
        assert_eq!((&PROXY_LOCAL[..12], &PROXY_LOCAL[12..]), (&SIGNATURE[..], &b"\x20\0\0\0"[..]));
    }
}
