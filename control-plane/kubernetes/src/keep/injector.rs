//! The webhook's configuration: the API server calls the injector only where it finds there whom
//! to trust.

use std::time::Instant;

use futures_util::StreamExt;
use k8s_openapi::{ByteString, api::admissionregistration::v1::MutatingWebhookConfiguration};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::watcher::{Event, watcher},
};
use serde_json::{Value, json};
use tokio::time::{sleep, sleep_until};

use super::{MANAGER, PAUSE, refused, retry_pause, unwatched, watch_one};
use crate::{Impairment, Impairments};

const GRANT: &str = "verbs get, list, watch and patch on mutatingwebhookconfigurations of \
                     apiGroup admissionregistration.k8s.io, by name";

/// Keeps `caBundle` in each webhook of the configuration `name`.
#[derive(Clone)]
pub struct InjectorBundle {
    pub client: Client,
    pub impairments: Impairments,
    pub name: String,
    /// The certificates, PEM.
    pub roots: String,
}

impl std::fmt::Debug for InjectorBundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InjectorBundle").finish_non_exhaustive()
    }
}

impl InjectorBundle {
    /// Keeps it for as long as it is polled.
    pub async fn run(self) {
        let api: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        let watch = || watcher(api.clone(), watch_one(&self.name)).boxed();
        let mut events = watch();
        let mut current: Option<MutatingWebhookConfiguration> = None;
        let mut listed = None;
        let mut retry: Option<Instant> = None;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(Event::Init)) => {
                        listed = None;
                        continue;
                    }
                    Some(Ok(Event::InitApply(found))) => {
                        listed = Some(found);
                        continue;
                    }
                    Some(Ok(Event::InitDone)) => current = listed.take(),
                    Some(Ok(Event::Apply(found))) => current = Some(found),
                    Some(Ok(Event::Delete(_))) => current = None,
                    Some(Err(error)) => {
                        if let Some(found) = unwatched(&self.what(), &error, GRANT) {
                            self.impairments.set(&self.what(), Some(found));
                        }
                        sleep(retry_pause()).await;
                        // A new list says whether it is over.
                        events = watch();
                        continue;
                    }
                    None => return,
                },
                () = sleep_until(retry.unwrap_or_else(Instant::now).into()), if retry.is_some() => {}
            }
            let found = self.correct(&api, current.as_ref()).await;
            retry = found.is_some().then(|| Instant::now() + retry_pause());
            self.impairments.set(&self.what(), found);
        }
    }

    /// What keeps it from being right.
    async fn correct(
        &self,
        api: &Api<MutatingWebhookConfiguration>,
        current: Option<&MutatingWebhookConfiguration>,
    ) -> Option<Impairment> {
        let Some(current) = current else {
            return Some(Impairment {
                what: self.what(),
                message: "it does not exist, so pods get no sidecar; `helm upgrade` puts the \
                          chart's back"
                    .to_owned(),
                blocking: false,
            });
        };
        let patch = patch(current, &self.roots)?;
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let patched = api
            .patch(&self.name, &params, &Patch::Strategic(patch))
            .await;
        sleep(PAUSE).await;
        match patched {
            Ok(_) => {
                tracing::info!(name = self.name, "wrote the webhook's caBundle");
                None
            }
            Err(error) => {
                let mut found = refused(&self.what(), "writing its caBundle", &error, GRANT);
                found.message.push_str(
                    "; pods of labelled namespaces cannot be created until the API server trusts \
                     the injector",
                );
                Some(found)
            }
        }
    }

    fn what(&self) -> String {
        format!("MutatingWebhookConfiguration {}", self.name)
    }
}

/// `None`: all of it is right. Webhooks are merged by their names.
fn patch(current: &MutatingWebhookConfiguration, roots: &str) -> Option<Value> {
    let bundle = ByteString(roots.as_bytes().to_vec());
    let wrong = current
        .webhooks
        .iter()
        .flatten()
        .filter(|webhook| webhook.client_config.ca_bundle.as_ref() != Some(&bundle))
        .map(|webhook| json!({"name": webhook.name, "clientConfig": {"caBundle": bundle}}));
    let wrong: Vec<Value> = wrong.collect();
    (!wrong.is_empty()).then(|| json!({ "webhooks": wrong }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wrong_is_patched() {
        let configuration = |bundles: &[Option<&str>]| -> MutatingWebhookConfiguration {
            let webhooks = bundles.iter().enumerate().map(|(n, bundle)| {
                let bundle = bundle.map(|text| ByteString(text.as_bytes().to_vec()));
                json!({
                    "name": format!("w{n}.turnpike.dev"), "admissionReviewVersions": ["v1"],
                    "sideEffects": "None", "clientConfig": {"caBundle": bundle},
                })
            });
            let webhooks: Vec<Value> = webhooks.collect();
            serde_json::from_value(json!({"metadata": {"name": "i"}, "webhooks": webhooks}))
                .unwrap()
        };
        assert_eq!(patch(&configuration(&[Some("PEM")]), "PEM"), None);
        let found = patch(&configuration(&[None, Some("PEM"), Some("old")]), "PEM").unwrap();
        let names: Vec<_> = found["webhooks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|w| &w["name"])
            .collect();
        assert_eq!(names, ["w0.turnpike.dev", "w2.turnpike.dev"]);
        assert_eq!(found["webhooks"][0]["clientConfig"]["caBundle"], "UEVN");
    }
}
