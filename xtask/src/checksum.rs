//! Owns checksums: the SHA-256 of bytes, and files of sums as `sha256sum` writes and reads them.
//! Called by `oci` and by `release`.
//! Must never write a sum that it did not compute from the bytes.

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// The SHA-256 of bytes, in lower-case hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The line of a file in a file of sums.
pub(crate) fn line(file: &str, bytes: &[u8]) -> String {
    format!("{}  {file}\n", sha256(bytes))
}

/// Compares every sum with the file that it names, which `read` returns; returns how many there are.
pub(crate) fn verify(sums: &str, read: impl Fn(&str) -> std::io::Result<Vec<u8>>) -> Result<usize> {
    for line in sums.lines() {
        let (sum, file) = line.split_once("  ").with_context(|| format!("`{line}` is not a checksum and a file"))?;
        let bytes = read(file).with_context(|| format!("cannot read {file}"))?;
        ensure!(sha256(&bytes) == sum, "{file} does not match its checksum");
    }
    ensure!(!sums.is_empty(), "there are no checksums");
    Ok(sums.lines().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_no_bytes_is_the_known_one() {
        assert_eq!(sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn sums_are_verified_against_the_files_that_they_name() {
        let sums = line("a", b"one") + &line("b", b"two");
        let read = |changed: &'static str| {
            move |file: &str| match file {
                "a" => Ok(b"one".to_vec()),
                "b" => Ok(changed.into()),
                _ => Err(std::io::Error::from(std::io::ErrorKind::NotFound)),
            }
        };
        assert_eq!(verify(&sums, read("two")).expect("sums that match"), 2);
        let error = verify(&sums, read("three")).expect_err("a file that changed");
        assert_eq!(error.to_string(), "b does not match its checksum");
        assert!(verify(&(sums + &line("c", b"")), read("two")).is_err(), "a file that is missing");
        assert!(verify("", read("two")).is_err(), "no sums at all");
        assert!(verify("nonsense\n", read("two")).is_err());
    }
}
