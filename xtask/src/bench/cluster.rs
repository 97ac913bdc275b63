//! Owns the cluster's part of the bench: starts the cluster lab, which measures in a cluster of its own.
//! Called by `bench`, with this area by name alone: it builds a whole Kubernetes first.
//! Must never measure another build of the guard than the image that operators install.

use anyhow::Result;

use super::rows::{Row, rows_of};
use crate::{cluster, demo, image};

/// Builds what it needs and runs it; its progress is shown, its output are the rows.
pub(super) fn measure(quick: bool, options: demo::Options) -> Result<Vec<Row>> {
    image::guard()?;
    cluster::agent_image()?;
    let mut words = options.lab();
    words.push("bench".to_owned());
    rows_of("nodeguard-cluster", &words, quick)
}
