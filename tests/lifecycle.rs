//! What the service manager is told, by sd_notify's protocol, as a socket of the tests hears it.

use crate::harness::{Folder, Gateway, PATIENCE, Upstream};
use std::os::unix::net::UnixDatagram;

#[test]
fn the_service_manager_is_told_of_start_reload_and_stop_and_the_watchdog_is_fed() {
    let (upstream, folder) = (Upstream::start(), Folder::new("notify"));
    let path = folder.0.join("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = |wanted: &str| {
        let mut buffer = [0; 1024];
        loop {
            let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{wanted} does not come: {error}"));
            let message = std::str::from_utf8(&buffer[..length]).unwrap().to_owned();
            if message.lines().any(|line| line.starts_with(wanted)) {
                return message;
            }
            assert!(message.starts_with("WATCHDOG=1"), "{message} comes before {wanted}");
        }
    };
    let mut gateway = Gateway::start_with(upstream.address, "", |command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    });
    next("READY=1");
    (0..3).for_each(|_| drop(next("WATCHDOG=1")));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    let reloading = next("RELOADING=1");
    let at = reloading.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).unwrap();
    assert!(at.parse::<u64>().unwrap() > 0, "{reloading}");
    next("READY=1");
    // A reload that fails ends as well.
    gateway.rewrite(|text| text.replace("[server]", "[sever]"));
    assert_eq!(gateway.admin_post("/reload").status, 500);
    next("RELOADING=1");
    next("READY=1");
    gateway.signal("TERM");
    next("STOPPING=1");
    next("STATUS=stopped, all requests were served");
    assert_eq!(gateway.ended().code(), Some(0));
}
