//! Owns the head of a family of metrics in the text format.
//! Called by whatever still writes that format itself.
//! Must never be called twice for one family.

use std::fmt::{self, Write};

/// HELP and TYPE.
pub fn family(out: &mut String, name: &str, help: &str, kind: &str) -> fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}
