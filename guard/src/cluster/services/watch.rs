//! Owns listening to the API server: lists and watches of Services and EndpointSlices (kube-rs), over connections of ours.
//! Called by `Services::watch`, for good.
//! Must never forget what was known because the API server is away, and never ask it oftener than its backoff says.

use std::{
    error::Error,
    fmt::Debug,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    Request,
    body::{Body, Frame, Incoming, SizeHint},
};
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
        api,
        services::{
            feed::Feed,
            known::{Known, Services},
            objects,
            view::{Change, Name},
        },
    },
    sys::{error_chain::with_causes, lock::lock},
};

/// How long an answer may go on: the API server ends a watch after 290 seconds, as it is asked to.
const LONGEST: Duration = Duration::from_secs(330);

/// Keeps the Services current. Never ends.
pub async fn follow(services: &Services) {
    let Some(known) = services.known() else { return std::future::pending().await };
    tokio::join!(
        kind(known, &known.services, objects::service, |change| lock(&known.view).service(change)),
        kind(known, &known.slices, objects::slice, |change| lock(&known.view).slice(change)),
    );
}

/// Listens for one kind of object.
async fn kind<K, T>(
    known: &Known,
    feed: &Arc<Feed>,
    read: impl Fn(K) -> Option<(Name, Option<T>)>,
    take: impl Fn(Change<T>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let api: Api<K> = Api::all(client(known, Arc::clone(feed)));
    // Out of the API server's cache: a guard on every node must not make etcd work.
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
                let error = with_causes(error.to_string(), error.source());
                if feed.failed(&error) {
                    tracing::error!(of = %plural, error, "cannot listen to the API server; what was known before stays");
                }
            }
        }
    }
}

/// A client of the library that sends through `tunnel/kube`: the same trust, files that are read for each request, no other TLS.
fn client(known: &Known, feed: Arc<Feed>) -> Client {
    let (kubeconfig, environment) = (known.kubeconfig.clone(), known.environment.clone());
    let send = move |request: Request<kube::client::Body>| {
        let (kubeconfig, environment, feed) = (kubeconfig.clone(), environment.clone(), Arc::clone(&feed));
        async move {
            let response = api::Api::new(kubeconfig.as_deref(), &environment)?.send(request, LONGEST).await?;
            let good = response.status().is_success();
            Ok::<_, api::ApiError>(response.map(|body| Answer::new(body, good.then_some(feed))))
        }
    };
    Client::new(tower::service_fn(send), "default")
}

/// An answer that is counted as long as it is open.
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
