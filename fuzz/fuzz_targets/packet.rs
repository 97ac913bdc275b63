//! A packet of anybody: parsing does not panic, and the ports that it finds are bytes of the packet.
#![cfg_attr(not(test), no_main)]

use guard_common::packet::{TCP, UDP, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for protocol in [TCP, UDP] {
        if let Some(packet) = parse(bytes, protocol) {
            assert_eq!(packet.is_v4, bytes[0] >> 4 == 4);
            if let Some(ports) = packet.ports {
                assert!(bytes.windows(2).any(|pair| pair == ports.source));
                assert!(bytes.windows(2).any(|pair| pair == ports.destination));
            }
        }
    }
});
