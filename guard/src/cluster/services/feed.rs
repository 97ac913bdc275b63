//! Owns how current the Services are: since when nothing was heard of them, and why.
//! Called by `watch`, which hears; `status`, the metrics and readiness show it.
//! Must never call what is old current: only an answer of the API server that is still open counts.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sys::{lock::lock, times::ago};

/// What `status` and the metrics say.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServicesState {
    /// Whether they were read as a whole.
    pub read: bool,
    /// How many Services have an address.
    pub services: usize,
    /// How many endpoints there are.
    pub endpoints: usize,
    /// Since when nothing was heard of them, seconds; 0 while the API server is listened to.
    pub age_seconds: Option<u64>,
    /// How often listening failed.
    pub errors: u64,
    /// Why it fails now.
    pub last_error: Option<String>,
}

impl ServicesState {
    /// The check of readiness: until they were read once, dials to Services are refused. What is old does not hold it back.
    pub fn readiness(&self) -> (bool, String) {
        (self.read, self.in_words())
    }

    /// One line for people.
    pub fn in_words(&self) -> String {
        let why = self.last_error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
        if !self.read {
            return format!("not read yet, dials to ClusterIPs are refused{why}");
        }
        let known = format!("{} known, {} endpoints", self.services, self.endpoints);
        match self.age_seconds {
            Some(0) => format!("{known}, current"),
            Some(age) => format!("{known}, as of {} ago{why}", ago(Duration::from_secs(age))),
            None => format!("{known}{why}"),
        }
    }
}

/// How much of an error is kept.
const MOST_TEXT: usize = 300;

/// What is heard of one kind of object.
#[derive(Debug, Default)]
pub(crate) struct Feed(Mutex<Heard>);

#[derive(Debug, Default)]
struct Heard {
    /// Answers that are still open.
    open: usize,
    /// When the last one ended.
    ended: Option<Instant>,
    errors: u64,
    error: Option<String>,
}

impl Feed {
    /// An answer begins.
    pub(crate) fn opened(&self) {
        let mut heard = lock(&self.0);
        heard.open += 1;
        heard.error = None;
    }

    /// An answer is over.
    pub(crate) fn closed(&self) {
        let mut heard = lock(&self.0);
        heard.open = heard.open.saturating_sub(1);
        heard.ended = Some(Instant::now());
    }

    /// There is none. Whether that is news.
    pub(crate) fn failed(&self, error: &str) -> bool {
        let mut heard = lock(&self.0);
        heard.errors += 1;
        // It is shown in answers, too.
        let error = error.get(..error.floor_char_boundary(MOST_TEXT)).unwrap_or_default();
        let news = heard.error.as_deref() != Some(error);
        heard.error = Some(error.to_owned());
        news
    }

    /// Since when nothing was heard; nothing: it never was.
    pub(crate) fn age(&self) -> Option<Duration> {
        let heard = lock(&self.0);
        if heard.open > 0 { Some(Duration::ZERO) } else { heard.ended.map(|ended| ended.elapsed()) }
    }

    pub(crate) fn errors(&self) -> u64 {
        lock(&self.0).errors
    }

    pub(crate) fn error(&self) -> Option<String> {
        lock(&self.0).error.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_open_answer_is_current() {
        let feed = Feed::default();
        assert_eq!(feed.age(), None);
        assert!(feed.failed("403") && !feed.failed("403") && feed.failed("other"));
        feed.opened();
        assert_eq!((feed.age(), feed.error(), feed.errors()), (Some(Duration::ZERO), None, 3));
        // A watch follows its list before that is over.
        feed.opened();
        feed.closed();
        assert_eq!(feed.age(), Some(Duration::ZERO));
        feed.closed();
        assert!(feed.age().is_some_and(|age| age > Duration::ZERO));
    }

    #[test]
    fn what_is_old_says_so_and_why() {
        let state = ServicesState { services: 3, endpoints: 5, ..ServicesState::default() };
        let (ready, said) = state.readiness();
        assert!(!ready && said == "not read yet, dials to ClusterIPs are refused");
        let state = ServicesState { read: true, age_seconds: Some(0), ..state };
        assert_eq!(state.readiness(), (true, "3 known, 5 endpoints, current".to_owned()));
        let state = ServicesState { age_seconds: Some(192), last_error: Some("no route".into()), ..state };
        assert_eq!(state.readiness(), (true, "3 known, 5 endpoints, as of 3m12s ago: no route".to_owned()));
    }
}
