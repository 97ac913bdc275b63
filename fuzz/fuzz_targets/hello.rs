//! The first bytes of both sides of a connection that must be TLS: the judgement does not depend on how they are split into pieces.
#![cfg_attr(not(test), no_main)]

use libfuzzer_sys::fuzz_target;
use nodeguard::dial::hello::{ClientHello, Told, judge_answer};

fuzz_target!(|bytes: &[u8]| {
    let Some((piece, bytes)) = bytes.split_first() else { return };
    let whole = ClientHello::default().push(bytes);
    let mut reader = ClientHello::default();
    let last = bytes.chunks(usize::from(*piece).max(1)).map(|part| reader.push(part)).last();
    assert_eq!(last.unwrap_or(Told::NotYet), whole);
    let _ = judge_answer(bytes);
});
