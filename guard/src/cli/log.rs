//! Owns the log of the daemons: its level, its format, and how fields are written.
//! Called by `main` before a daemon starts.
//! Must never write a field as it came: others wrote some of them, and a log is read on terminals.

use std::{fmt, io};

use guard_policy::visible::{visible, visible_lines};
use tracing_subscriber::{
    EnvFilter,
    field::MakeExt as _,
    fmt::{FormatFields, format::Writer},
};

use crate::cli::args::LogFormat;

/// Starts the log on stderr. `RUST_LOG` sets the level, which is `info` by default.
pub fn start(format: LogFormat, colour: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colour);
    match format {
        LogFormat::Text => builder.fmt_fields(fields()).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

/// The message, then each field with its name. Line ends in a message are our own: what others wrote is in fields.
fn fields() -> impl for<'writer> FormatFields<'writer> + 'static {
    tracing_subscriber::fmt::format::debug_fn(|writer: &mut Writer<'_>, field, value: &dyn fmt::Debug| {
        let text = format!("{value:?}");
        match field.name() {
            "message" => writer.write_str(&visible_lines(&text)),
            name if writer.has_ansi_escapes() => {
                write!(writer, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{}", visible(&text))
            }
            name => write!(writer, "{name}={}", visible(&text)),
        }
    })
    .delimited(" ")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::sys::lock::lock;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_field_neither_ends_its_line_nor_steers_the_terminal() {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .without_time()
            .fmt_fields(fields())
            .finish();
        let hostile = "\u{1b}[2J\n INFO all is well\u{202e}";
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(shown = %hostile, quoted = hostile, number = 7, "a dial is\nrefused");
        });
        let text = String::from_utf8(lock(&written.0).clone()).unwrap();
        let shown = "\\u{1b}[2J\\n INFO all is well\\u{202e}";
        assert_eq!(
            text.trim_start(),
            format!("WARN nodeguard::cli::log::tests: a dial is\nrefused shown={shown} quoted=\"{shown}\" number=7\n")
        );
    }
}
