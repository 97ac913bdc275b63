//! Owns the judgement whether first bytes are TLS: the client's, which come in pieces, and the server's answer. Pure.
//! Called by `gate`, for dials for which the policy requires TLS.
//! Must never accept what a TLS server would not accept as a ClientHello, nor hold more bytes than the longest ClientHello has.
//!
//! RFC 8446, sections 4.1.2 and 5.1; RFC 5246, section 7.4.1.2. TLS 1.0 and later; SSL 2 and 3 are refused.

/// The longest accepted ClientHello, bytes. One with post-quantum keys has about 2,000.
pub const LONGEST: usize = 16 << 10;
/// How many bytes of an answer are enough to judge it.
pub const ANSWER: usize = 7;

/// The most bytes in a record.
const RECORD: usize = 1 << 14;
const HANDSHAKE: u8 = 22;
const ALERT: u8 = 21;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;

/// The judgement on the bytes so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The beginning of TLS; more is needed.
    NotYet,
    /// TLS.
    Tls,
    /// Not TLS, whatever follows, and why.
    Not(&'static str),
}

/// Reads a ClientHello in pieces.
#[derive(Clone, Debug, Default)]
pub struct ClientHello {
    /// The header of the current record.
    header: Vec<u8>,
    /// How many bytes of the current record are missing.
    rest: usize,
    /// The handshake message so far, over all records.
    message: Vec<u8>,
    told: Option<Told>,
}

impl ClientHello {
    /// Takes the next bytes. A judgement is final; bytes after the end of the hello are ignored.
    pub fn push(&mut self, bytes: &[u8]) -> Told {
        for byte in bytes {
            if let Some(told) = self.told {
                return told;
            }
            match self.take(*byte) {
                Told::NotYet => {}
                told @ (Told::Tls | Told::Not(_)) => self.told = Some(told),
            }
        }
        self.told.unwrap_or(Told::NotYet)
    }

    fn take(&mut self, byte: u8) -> Told {
        if self.rest == 0 {
            self.header.push(byte);
            return match self.header[..] {
                [kind, ..] if kind != HANDSHAKE => Told::Not("the first byte is not that of a TLS handshake"),
                [_, major, ..] if major != 3 => Told::Not("not a version of TLS"),
                [_, _, minor, ..] if !(1..=3).contains(&minor) => Told::Not("not a version of TLS"),
                [_, _, _, high, low] => {
                    self.rest = usize::from(u16::from_be_bytes([high, low]));
                    self.header.clear();
                    if (1..=RECORD).contains(&self.rest) {
                        Told::NotYet
                    } else {
                        Told::Not("a record of an impossible length")
                    }
                }
                _ => Told::NotYet,
            };
        }
        self.rest -= 1;
        self.message.push(byte);
        match self.message[..] {
            [kind, ..] if kind != CLIENT_HELLO => Told::Not("a handshake that does not begin with a ClientHello"),
            [_, high, middle, low, ref body @ ..] => {
                let length = u32::from_be_bytes([0, high, middle, low]) as usize;
                if length > LONGEST {
                    Told::Not("a ClientHello of an impossible length")
                } else if body.len() < length {
                    Told::NotYet
                } else if self.rest > 0 {
                    Told::Not("bytes behind the ClientHello in its record")
                } else if is_body(body) {
                    Told::Tls
                } else {
                    Told::Not("a malformed ClientHello")
                }
            }
            _ => Told::NotYet,
        }
    }
}

/// Judges the first bytes of the backend's answer. TLS is a ServerHello (a HelloRetryRequest is one, too) or an alert.
pub fn judge_answer(bytes: &[u8]) -> Told {
    match *bytes {
        [] => Told::NotYet,
        [kind, ..] if kind != HANDSHAKE && kind != ALERT => Told::Not("the first byte is not that of a TLS handshake"),
        [_, major, ..] if major != 3 => Told::Not("not a version of TLS"),
        [_, _, minor, ..] if minor > 3 => Told::Not("not a version of TLS"),
        [ALERT, _, _, high, low, level, _, ..] => match (u16::from_be_bytes([high, low]), level) {
            (2, 1 | 2) => Told::Tls,
            _ => Told::Not("a malformed alert"),
        },
        [HANDSHAKE, _, _, high, low, kind, _, ..] => match (usize::from(u16::from_be_bytes([high, low])), kind) {
            (4..=RECORD, SERVER_HELLO) => Told::Tls,
            _ => Told::Not("a handshake that does not begin with a ServerHello"),
        },
        _ => Told::NotYet,
    }
}

/// Whether the fields of a ClientHello fill its body exactly.
fn is_body(body: &[u8]) -> bool {
    let mut fields = Fields(body);
    let mut read = || -> Option<bool> {
        let version = fields.number()?;
        let _random = fields.take(32)?;
        let session = fields.short()?;
        let suites = fields.long()?;
        let compressions = fields.short()?;
        let head = (0x0301..=0x0303).contains(&version)
            && session.len() <= 32
            && suites.len() >= 2
            && suites.len().is_multiple_of(2)
            && compressions.contains(&0);
        // In TLS 1.2 the extensions are optional, including their length.
        if fields.0.is_empty() {
            return Some(head);
        }
        let mut extensions = Fields(fields.long()?);
        let mut seen = Vec::new();
        while !extensions.0.is_empty() {
            seen.push(extensions.number()?);
            extensions.long()?;
        }
        let count = seen.len();
        seen.sort_unstable();
        seen.dedup();
        Some(head && fields.0.is_empty() && seen.len() == count)
    };
    read().unwrap_or(false)
}

/// The unread rest.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u16> {
        self.take(2).and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes)
    }

    /// The bytes that follow a length of one byte.
    fn short(&mut self) -> Option<&'a [u8]> {
        let length = *self.take(1)?.first()?;
        self.take(usize::from(length))
    }

    /// The bytes that follow a length of two bytes.
    fn long(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(usize::from(length))
    }
}

#[cfg(test)]
#[path = "hello_tests.rs"]
mod tests;
