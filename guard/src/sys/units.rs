//! Owns durations, sizes and booleans as operators write them in flags.
//! Called by the flags, by the limits and by `tunnel/identifiers`.
//! Must never guess a unit.

use std::time::Duration;

/// The text is not a value of its kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a boolean.
    #[error("`{0}` is neither true nor false")]
    Boolean(String),
    /// Not a duration.
    #[error("`{0}` is not a duration; write it as in `1s`, `100ms` or `1h30m`")]
    Duration(String),
    /// Not a size.
    #[error("`{0}` is not a size; write it as in `100Mi`, `512KiB` or as a number of bytes")]
    Size(String),
    /// A size below the smallest that makes sense.
    #[error("`{text}` is too small; the smallest size here is {least}")]
    TooSmall {
        /// The text.
        text: String,
        /// The smallest size, as an operator would write it.
        least: &'static str,
    },
}

/// Reads a boolean as Go's `strconv.ParseBool` does.
pub fn boolean(text: &str) -> Result<bool, UnitError> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err(UnitError::Boolean(text.to_owned())),
    }
}

/// Reads a duration as Go's `time.ParseDuration` does: `1h0m0s`, `100ms`, `1.5s`.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    let failed = || UnitError::Duration(text.to_owned());
    let (mut rest, mut total) = (text, 0f64);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(failed)?;
        let number: f64 = rest.get(..digits).and_then(|number| number.parse().ok()).ok_or_else(failed)?;
        let after = rest.get(digits..).unwrap_or_default();
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(failed()),
        };
        total += number * seconds;
        rest = next;
    }
    if text.is_empty() { Err(failed()) } else { Duration::try_from_secs_f64(total).map_err(|_| failed()) }
}

/// Reads a size as Kubernetes writes quantities of bytes, with or without a `B`: `8MiB`, `8Mi`, `64KiB`, `1Gi`, or a number of bytes.
pub fn size(text: &str) -> Result<u64, UnitError> {
    let failed = || UnitError::Size(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.strip_suffix('B').unwrap_or(unit) {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return Err(failed()),
    };
    number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(failed)
}

/// Reads the size of a buffer. A buffer smaller than the largest message would refuse what a well-behaved server sends.
pub fn buffer_size(text: &str) -> Result<usize, UnitError> {
    let bytes = at_least(text, 64 << 10, "64KiB")?;
    usize::try_from(bytes).map_err(|_| UnitError::Size(text.to_owned()))
}

/// Reads the size of a file, at least 1Mi.
pub fn file_size(text: &str) -> Result<u64, UnitError> {
    at_least(text, 1 << 20, "1Mi")
}

fn at_least(text: &str, bytes: u64, least: &'static str) -> Result<u64, UnitError> {
    let too_small = || UnitError::TooSmall { text: text.to_owned(), least };
    size(text).and_then(|size| if size < bytes { Err(too_small()) } else { Ok(size) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        for (text, millis) in [("0", 0), ("1h0m0s", 3_600_000), ("1m30s", 90_000), ("500ms", 500), ("1.5s", 1500)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "s", "1 s", "-1s", "2 hours", "1d", "1.2.3s", "1e3s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_one_grammar() {
        assert_eq!(
            (buffer_size("8MiB"), buffer_size("64Ki"), buffer_size("65536")),
            (Ok(8 << 20), Ok(1 << 16), Ok(1 << 16))
        );
        assert_eq!(
            (file_size("100Mi"), file_size("1MiB"), file_size("2Gi")),
            (Ok(100 << 20), Ok(1 << 20), Ok(2 << 30))
        );
        for text in ["", "Mi", "1.5Mi", "+1Mi", "8MB", "8M", "1B", "99999999999Gi", "0"] {
            assert!(buffer_size(text).is_err() && file_size(text).is_err(), "{text}");
        }
        assert!(buffer_size("63Ki").is_err() && file_size("1023Ki").is_err());
    }
}
