//! Owns the text of an error with its causes.
//! Called by whoever logs or stores an error whose text leaves its cause to `source`.
//! Must never say the same cause twice.

use std::error::Error;

/// The text of an error and of all its causes.
pub(crate) fn chain(error: &dyn Error) -> String {
    with_causes(error.to_string(), error.source())
}

/// A text, followed by the causes that it does not contain yet.
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
        let text = |said: &Said| chain(said);
        let timed_out = || io::Error::from(io::ErrorKind::TimedOut);
        assert_eq!(text(&Said("cannot read", timed_out())), "cannot read: timed out");
        assert_eq!(text(&Said("cannot read: timed out", timed_out())), "cannot read: timed out");
    }
}
