//! Owns the lists and watches of Services and EndpointSlices (kube), over our own connections to the API server.
//! Called by the daemons, which spawn [`follow`].
//! Must never forget what is known because the API server is away, and never ask it more often than its backoff allows.

use std::{
    fmt::Debug,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use kube::{
    Api, Client, Resource,
    runtime::{
        WatchStreamExt,
        watcher::{self, Config, Event},
    },
};
use serde::de::DeserializeOwned;
use tokio_stream::StreamExt;

use crate::{
    cluster::{
        api_server,
        services::{
            feed::Feed,
            known::{Known, Services},
            objects,
            view::{Change, Name},
        },
    },
    sys::lock::lock,
};

/// The longest answer: the API server ends a watch after the requested 290 seconds.
const LONGEST: Duration = Duration::from_secs(330);

/// Keeps the Services current. Never ends.
pub async fn follow(services: &Services) {
    let Some(known) = services.known() else { return std::future::pending().await };
    tokio::join!(
        kind(known, &known.services, objects::service, |change| lock(&known.view).service(change)),
        kind(known, &known.slices, objects::slice, |change| lock(&known.view).slice(change)),
    );
}

/// Keeps one kind of object current.
async fn kind<K, T>(
    known: &Known,
    feed: &Arc<Feed>,
    read: impl Fn(K) -> Option<(Name, Option<T>)>,
    take: impl Fn(Change<T>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let api: Api<K> = Api::all(client(known, Arc::clone(feed)));
    // From the API server's cache: the guards of all nodes must not load etcd.
    let mut events = pin!(watcher::watcher(api, Config::default().any_semantic()).default_backoff());
    let plural = K::plural(&());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => take(Change::Begin),
            Ok(Event::InitApply(object)) => {
                read(object).into_iter().for_each(|(name, kept)| take(Change::Listed(name, kept)))
            }
            Ok(Event::InitDone) => {
                take(Change::Done);
                tracing::info!(of = %plural, "read");
            }
            Ok(Event::Apply(object)) => read(object).into_iter().for_each(|(name, kept)| take(Change::Set(name, kept))),
            Ok(Event::Delete(object)) => read(object).into_iter().for_each(|(name, _)| take(Change::Set(name, None))),
            Err(error) => {
                let error = api_server::explain(&error);
                if feed.failed(&error) {
                    tracing::error!(of = %plural, error, "cannot watch the API server; what was known before stays in use");
                }
            }
        }
    }
}

/// A client whose successful answers tell the feed how long they are open.
fn client(known: &Known, feed: Arc<Feed>) -> Client {
    let (kubeconfig, environment) = (known.kubeconfig.clone(), known.environment.clone());
    api_server::client(kubeconfig, environment, LONGEST, move |answer| {
        let feed = answer.status().is_success().then(|| Arc::clone(&feed));
        answer.map(|body| Answer::new(body, feed))
    })
}

/// An answer that the feed counts while it is open.
struct Answer {
    body: Incoming,
    feed: Option<Arc<Feed>>,
}

impl Answer {
    fn new(body: Incoming, feed: Option<Arc<Feed>>) -> Answer {
        feed.iter().for_each(|feed| feed.opened());
        Answer { body, feed }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.feed.iter().for_each(|feed| feed.closed());
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
