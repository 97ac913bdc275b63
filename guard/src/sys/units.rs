//! Owns durations, sizes and booleans as operators write them.
//! Called by the flags, by identifiers and by the limits.
//! Must never guess a unit.

use std::time::Duration;

/// A boolean as Go's `strconv.ParseBool` reads it.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err(format!("`{text}` is neither true nor false")),
    }
}

/// A duration as Go writes it: `1h0m0s`, `100ms`, `1.5s`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let failed = || format!("`{text}` is no duration; write it as in `1s`, `100ms` or `1h30m`");
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

/// A size as Kubernetes writes quantities of bytes, with or without the B: `8MiB`, `8Mi`, `64KiB`, `1GiB`, or bytes.
pub fn size(text: &str) -> Result<usize, String> {
    let failed = || format!("`{text}` is no size, as in 8MiB, 512KiB or a number of bytes");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: usize = match unit.strip_suffix('B').unwrap_or(unit) {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return Err(failed()),
    };
    let bytes = number.parse::<usize>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(failed)?;
    // Less than the largest message would refuse what a well-behaved server sends.
    if bytes < 1 << 16 { Err(format!("`{text}` is less than 64KiB")) } else { Ok(bytes) }
}
