//! Bytes as lower-case hex digits: ids of requests, traces and tokens. It must not know what the bytes are.

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Two digits for each byte, as many as there is room for.
pub fn write(bytes: &[u8], out: &mut [u8]) {
    for (pair, byte) in out.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

pub fn encode(bytes: &[u8]) -> String {
    let mut digits = vec![0; 2 * bytes.len()];
    write(bytes, &mut digits);
    // Always ASCII.
    String::from_utf8(digits).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_two_lower_case_digits() {
        for byte in 0..=u8::MAX {
            assert_eq!(encode(&[byte, !byte]), format!("{byte:02x}{:02x}", !byte));
        }
        assert_eq!(encode(&[]), "");
    }
}
