//! Metrics, health, and what on-call wants to see, over plain HTTP.

use std::sync::Arc;

use serde::Serialize;
use tokio::net::TcpListener;
use turnpike_daemon::pages::{
    self, CONNECTION_LIFETIME, Request, Response, StatusCode, json, text,
};
use turnpike_discovery::{Adoption, Counters, Discovery, SubscriberStatus};
use turnpike_kubernetes::Place;

use crate::{feed::Health, metrics::Metrics};

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Pages {
    pub metrics: Metrics,
    pub discovery: Discovery,
    pub health: Arc<Health>,
}

/// Serves until dropped, and its connections with it.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let answer = move |request| std::future::ready(pages.answer(&request));
    pages::serve(listener, CONNECTION_LIFETIME, answer).await;
}

impl Pages {
    fn answer(&self, request: &Request) -> Response {
        if !request.is_safe() {
            return pages::read_only();
        }
        match request.uri.path() {
            "/metrics" => pages::metrics(self.metrics.text()),
            "/healthz/live" => pages::live(),
            "/healthz/ready" => pages::ready(self.health.why_not_ready()),
            "/debug/rejections" | "/debug/status" if !request.from_this_host => text(
                StatusCode::FORBIDDEN,
                "/debug is for callers on the controller's own host: use kubectl port-forward, or \
                 ask over loopback\n",
            ),
            "/debug/rejections" => json(&self.health.rejections()),
            "/debug/status" => json(&self.status()),
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /metrics, /healthz/live, /healthz/ready, /debug/rejections, \
                 /debug/status\n",
            ),
        }
    }

    fn status(&self) -> Status {
        let statuses = self.discovery.read(turnpike_model::Model::statuses);
        let policies = statuses.into_iter().map(|status| {
            let shaped = self.discovery.read(|model| model.shaped_by(&status.object));
            let conditions = status
                .conditions
                .into_iter()
                .map(|condition| ConditionStatus {
                    condition: condition.kind.to_string(),
                    status: condition.holds,
                    reason: condition.reason,
                    message: condition.message,
                });
            PolicyStatus {
                place: self.health.place(&status.object),
                object: status.object.to_string(),
                parent: status.parent,
                conditions: conditions.collect(),
                proxies: self.discovery.adoption(&shaped),
            }
        });
        Status {
            ready: self.health.why_not_ready().is_none(),
            policies: policies.collect(),
            discovery: self.discovery.counters(),
            subscribers: self.discovery.status(),
        }
    }
}

#[derive(Serialize)]
struct Status {
    ready: bool,
    policies: Vec<PolicyStatus>,
    discovery: Counters,
    subscribers: Vec<SubscriberStatus>,
}

#[derive(Serialize)]
struct PolicyStatus {
    object: String,
    /// Where something does not hold, and the object is in a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    conditions: Vec<ConditionStatus>,
    proxies: Adoption,
}

#[derive(Serialize)]
struct ConditionStatus {
    #[serde(rename = "type")]
    condition: String,
    status: bool,
    reason: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

#[cfg(test)]
mod tests {
    use turnpike_daemon::pages::Method;
    use turnpike_model::{Model, Settings};

    use super::*;

    fn pages() -> Pages {
        let settings = Settings {
            cluster: "cluster".into(),
            trust_domain: "cluster.local".into(),
            network: "default".into(),
        };
        Pages {
            metrics: Metrics::new(),
            discovery: Discovery::new(Model::new(settings)),
            health: Arc::default(),
        }
    }

    #[test]
    fn debug_pages_are_for_the_same_host() {
        let pages = pages();
        let status = |method, path: &str, from_this_host| {
            let request = Request {
                method,
                uri: path.parse().unwrap(),
                from_this_host,
            };
            pages.answer(&request).status()
        };
        for path in ["/debug/rejections", "/debug/status"] {
            assert_eq!(status(Method::GET, path, true), StatusCode::OK);
            assert_eq!(status(Method::GET, path, false), StatusCode::FORBIDDEN);
        }
        assert_eq!(status(Method::GET, "/metrics", false), StatusCode::OK);
        assert_eq!(
            status(Method::GET, "/healthz/ready", false),
            StatusCode::SERVICE_UNAVAILABLE
        );
        let post = status(Method::POST, "/metrics", true);
        assert_eq!(post, StatusCode::METHOD_NOT_ALLOWED);
    }
}
