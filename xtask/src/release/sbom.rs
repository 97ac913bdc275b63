//! Owns the bill of materials of the guard's binary, which cargo-cyclonedx makes from the lock file.
//! Called by `release`.
//! Must never leave a file outside `dist/`.

use std::{collections::BTreeSet, fs};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    shell::{command, find, read, root, run},
    tools::CARGO_CYCLONEDX,
};

/// The bill of materials (CycloneDX, JSON) of the guard for its target.
pub(super) fn of_the_guard(epoch: u64) -> Result<Vec<u8>> {
    CARGO_CYCLONEDX.install()?;
    // It writes beside the manifest of every member of the workspace.
    let name = "release-sbom";
    let mut make = command(find("cargo").context("cargo is not in PATH")?);
    make.args(["cyclonedx", "--quiet", "--format", "json", "--spec-version", "1.5", "--override-filename", name]);
    make.args(["--target", crate::image::TARGET]).env("SOURCE_DATE_EPOCH", epoch.to_string());
    let made = run(&mut make);
    let bytes = fs::read(root().join(format!("guard/{name}.json")));
    for file in read(command("git").args(["ls-files", "--others", &format!("*/{name}.json")]))?.lines() {
        fs::remove_file(root().join(file))?;
    }
    made?;
    let bytes = bytes.context("cargo-cyclonedx wrote no file for the guard")?;
    check(&bytes, &["aya", "guard-common", "rustls", "tokio"])?;
    Ok(bytes)
}

/// A bill of materials that does not name what is certainly linked is not one of this binary.
fn check(bytes: &[u8], linked: &[&str]) -> Result<()> {
    let bill: Value = serde_json::from_slice(bytes).context("the bill of materials")?;
    let components = bill.get("components").and_then(Value::as_array).context("it has no components")?;
    let names: BTreeSet<&str> = components.iter().filter_map(|component| component.get("name")?.as_str()).collect();
    for name in linked {
        ensure!(names.contains(name), "the bill of materials does not name {name}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_without_what_is_linked_is_refused() {
        let bill = br#"{"bomFormat": "CycloneDX", "components": [{"name": "aya"}, {"name": "tokio"}]}"#;
        assert!(check(bill, &["aya", "tokio"]).is_ok());
        assert!(check(bill, &["aya", "rustls"]).is_err());
        assert!(check(b"{}", &[]).is_err());
    }
}
