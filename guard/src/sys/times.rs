//! Owns points in time and durations in the form that people read.
//! Called by everything that reports when something happened.
//! Must never be parsed again: these are for people.

use std::time::{Instant, SystemTime};

/// How long ago an RFC 3339 time was, as kubectl says it: `42s`, `5m13s`, `3h7m`, `2d4h`.
pub fn age(since: &str) -> String {
    let Ok(since) = since.parse::<jiff::Timestamp>() else { return since.to_owned() };
    let now = jiff::Timestamp::try_from(SystemTime::now()).unwrap_or(since);
    ago(std::time::Duration::from_secs(u64::try_from(now.as_second() - since.as_second()).unwrap_or(0)))
}

/// A duration, as kubectl writes ages.
pub fn ago(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{}s", seconds % 60),
        3600..86_400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// The time of an instant, RFC 3339.
pub fn rfc3339(instant: Instant) -> String {
    let elapsed = jiff::SignedDuration::try_from(instant.elapsed()).unwrap_or_default();
    jiff::Timestamp::now().checked_sub(elapsed).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_like_kubectls() {
        let ago = |seconds: i64| {
            let now = jiff::Timestamp::try_from(SystemTime::now()).unwrap();
            age(&jiff::Timestamp::from_second(now.as_second() - seconds).unwrap().to_string())
        };
        assert_eq!((ago(313).as_str(), ago(11_220).as_str(), ago(187_200).as_str()), ("5m13s", "3h7m", "2d4h"));
    }
}
