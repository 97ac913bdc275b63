//! The first bytes of both sides: what they are told to be does not depend on the pieces that they come in.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nodeguard::hello::{ClientHello, Told, answer};

fuzz_target!(|bytes: &[u8]| {
    let Some((piece, bytes)) = bytes.split_first() else { return };
    let whole = ClientHello::default().push(bytes);
    let mut reader = ClientHello::default();
    let last = bytes.chunks(usize::from(*piece).max(1)).map(|part| reader.push(part)).last();
    assert_eq!(last.unwrap_or(Told::NotYet), whole);
    let _ = answer(bytes);
});
