//! Owns the words of an error with what is behind it.
//! Called by `tunnel/session` and `services/watch`, whose libraries tell only their own part of an error.
//! Must never say the same twice.

use std::error::Error;

/// What is said of an error, followed by its causes as far as they say more.
pub(crate) fn with_causes(said: String, mut source: Option<&(dyn Error + 'static)>) -> String {
    let mut text = said;
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(&'static str, #[source] io::Error);

    #[test]
    fn a_cause_is_told_once() {
        let text = |said: &Said| with_causes(said.to_string(), said.source());
        let timed_out = || io::Error::from(io::ErrorKind::TimedOut);
        assert_eq!(text(&Said("cannot read", timed_out())), "cannot read: timed out");
        assert_eq!(text(&Said("cannot read: timed out", timed_out())), "cannot read: timed out");
    }
}
