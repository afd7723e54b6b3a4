//! What went wrong with the API server, and what a person should do about it.

use std::{error::Error as _, time::Duration};

use kube::{
    core::{ApiResource, Status},
    runtime::watcher,
};

use crate::Impairment;

/// Why a list or watch of a kind failed, by what follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The kind does not exist there: its CRD is not installed.
    Absent,
    /// With the server's words.
    Forbidden(String),
    /// The server answered with another error, in its words.
    Refused(String),
    /// No answer. Said once for the whole server, not for each kind.
    Unreachable,
    /// Too much happened since the last event: a new list brings it. Not worth telling.
    Outdated,
    /// No event but something else came. The client looks at no watch's HTTP status, so this is
    /// how some refusals of a watch arrive; a new list says which.
    Garbled,
}

impl Trouble {
    pub(super) fn of(error: &watcher::Error) -> Self {
        match error {
            watcher::Error::WatchFailed(kube::Error::SerdeError(_)) => Self::Garbled,
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => match error {
                kube::Error::Api(status) => Self::answered(status),
                kube::Error::SerdeError(error) => Self::Refused(error.to_string()),
                _ => Self::Unreachable,
            },
            watcher::Error::WatchError(status) => Self::answered(status),
            watcher::Error::NoResourceVersion => Self::Refused(error.to_string()),
        }
    }

    fn answered(status: &Status) -> Self {
        match status.code {
            403 => Self::Forbidden(status.message.clone()),
            404 => Self::Absent,
            410 => Self::Outdated,
            code => Self::Refused(format!("{code} {}", status.message.trim())),
        }
    }

    /// Whether it is likely to be over in a moment.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    /// `None`: nobody needs to act, or it is said elsewhere.
    pub(super) fn impairment(&self, resource: &ApiResource) -> Option<Impairment> {
        let ApiResource { group, plural, .. } = resource;
        let what = name(resource);
        let (message, blocking) = match self {
            Self::Absent => (absent(resource), false),
            Self::Forbidden(text) => (
                format!(
                    "it cannot be read: {text}; grant verbs get, list and watch on resource \
                     `{plural}` of apiGroup `{group}` in the controller's ClusterRole (`helm \
                     upgrade` puts the chart's back); what was read before stays in force"
                ),
                true,
            ),
            Self::Refused(text) => (
                format!("it cannot be read: {text}; what was read before stays in force"),
                true,
            ),
            Self::Unreachable | Self::Outdated | Self::Garbled => return None,
        };
        Some(Impairment {
            what,
            message,
            blocking,
        })
    }
}

/// `pods`, `egresspolicies.turnpike.dev`.
pub(super) fn name(resource: &ApiResource) -> String {
    match &*resource.group {
        "" => resource.plural.clone(),
        group => format!("{}.{group}", resource.plural),
    }
}

fn absent(resource: &ApiResource) -> String {
    let what = match &*resource.group {
        "turnpike.dev" => "install the chart's CRDs (`kubectl apply -f charts/turnpike/crds`)",
        "gateway.networking.k8s.io" => "install the Gateway API's CRDs to route with it",
        _ => "this API server does not serve it",
    };
    format!(
        "{} `{}` does not exist in this cluster; {what}. Everything else goes on without it, and \
         it is read as soon as it exists",
        resource.kind, resource.api_version
    )
}

/// The whole server cannot be asked.
pub(super) fn unreachable(server: &str, error: &kube::Error) -> Impairment {
    let message = match error {
        kube::Error::Api(status) if status.code == 401 => {
            "the API server does not accept the controller's credentials; is its service account \
             token mounted, and the service account there? What was read before stays in force"
                .to_owned()
        }
        kube::Error::Api(status) => format!(
            "the API server does not answer as it should: {} {}; what was read before stays in \
             force",
            status.code,
            status.message.trim()
        ),
        error => format!(
            "the API server cannot be reached: {}; what was read before stays in force, and the \
             controller tries again by itself",
            causes(error)
        ),
    };
    Impairment {
        what: server.to_owned(),
        message,
        blocking: true,
    }
}

/// The whole server can be asked and does not answer.
pub(super) fn silent(server: &str, patience: Duration) -> Impairment {
    Impairment {
        what: server.to_owned(),
        message: format!(
            "the API server has not answered within {} s; what was read before stays in force, \
             and the controller tries again by itself",
            patience.as_secs()
        ),
        blocking: true,
    }
}

/// An error with what caused it, without repeating what an outer one already says.
fn causes(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use turnpike_api::Kind;

    use super::*;

    fn failed(code: u16, message: &str) -> watcher::Error {
        let status = Status::failure(message, "").with_code(code);
        watcher::Error::InitialListFailed(kube::Error::Api(status.boxed()))
    }

    #[test]
    fn what_to_do_is_said() {
        let text = |kind: Kind, code, message| {
            let trouble = Trouble::of(&failed(code, message));
            trouble
                .impairment(&kind.resource())
                .map(|i| (i.to_string(), i.blocking))
        };
        let (forbidden, blocking) = text(
            Kind::EgressPolicy,
            403,
            "egresspolicies.turnpike.dev is forbidden: User \"x\" cannot list resource",
        )
        .unwrap();
        assert_eq!(
            forbidden,
            "egresspolicies.turnpike.dev: it cannot be read: egresspolicies.turnpike.dev is \
             forbidden: User \"x\" cannot list resource; grant verbs get, list and watch on \
             resource `egresspolicies` of apiGroup `turnpike.dev` in the controller's ClusterRole \
             (`helm upgrade` puts the chart's back); what was read before stays in force"
        );
        assert!(blocking);
        let (absent, blocking) = text(Kind::HttpRoute, 404, "404 page not found").unwrap();
        assert!(
            absent.starts_with("httproutes.gateway.networking.k8s.io: HTTPRoute `gateway"),
            "{absent}"
        );
        assert!(
            absent.contains("install the Gateway API's CRDs"),
            "{absent}"
        );
        assert!(!blocking);
        assert_eq!(text(Kind::Pod, 410, "too old"), None);
    }
}
