//! Owns the pin of a public key: its SHA-256, in the notation that operators use.
//! Called by `parse/last_hop`, by `net/verify` for proxy-servers and by `dial/kubelet` for kubelet.
//! Must never be computed from anything but the whole SubjectPublicKeyInfo.

use std::{fmt, str::FromStr};

use data_encoding::{BASE64, BASE64_NOPAD};
use rustls_pki_types::SubjectPublicKeyInfoDer;
use sha2::{Digest, Sha256};

/// The SHA-256 of a public key (SubjectPublicKeyInfo, DER), as in RFC 7469. It is written `sha256/` and 44 characters of base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pin([u8; 32]);

impl Pin {
    /// Computes the pin of a key.
    pub fn of(key: &SubjectPublicKeyInfoDer<'_>) -> Pin {
        Pin(Sha256::digest(key).into())
    }
}

/// The text is not a pin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a pin; write `sha256/` and the base64 of 32 bytes")]
pub struct PinError(String);

impl FromStr for Pin {
    type Err = PinError;

    fn from_str(text: &str) -> Result<Pin, PinError> {
        let digits = text.strip_prefix("sha256/").or(text.strip_prefix("sha256//")).unwrap_or(text);
        // Some tools leave out the padding; 32 bytes always have one `=`.
        let bytes =
            BASE64_NOPAD.decode(digits.trim_end_matches('=').as_bytes()).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Pin).ok_or_else(|| PinError(text.to_owned()))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256/{}", BASE64.encode(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pin_is_what_curl_and_rfc_7469_write() {
        let text = "sha256/AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        let pin: Pin = text.parse().unwrap();
        assert_eq!(pin.to_string(), text);
        for bad in ["", "sha256/", "sha256/AQID", "sha1/AQIDBAUGBwgJCgsMDQ4PEBESExQ=", "sha256/****"] {
            assert!(bad.parse::<Pin>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_pin_reads_as_it_is_written(bytes in any::<[u8; 32]>()) {
            let text = Pin(bytes).to_string();
            prop_assert_eq!(text.parse::<Pin>(), Ok(Pin(bytes)));
        }
    }
}
