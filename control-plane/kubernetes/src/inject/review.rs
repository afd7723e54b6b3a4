//! An admission review answered: bytes of the API server's question in, the answer out.
//!
//! The answer is a JSON patch of what injection adds. It is made for the pod as it was sent, so
//! that fields which this version does not know stay as they are.

use std::collections::BTreeMap;

use json_patch::{AddOperation, Patch, PatchOperation, RemoveOperation, jsonptr::PointerBuf};
use k8s_openapi::api::core::v1::Pod;
use kube::core::{
    DynamicObject,
    admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation},
};
use serde_json::{Value, json};

use super::{CONTAINER, INJECTED, InjectConfig, Injection, Reason, inject, sidecar};

/// A pod that is about to be created.
#[derive(Clone, Debug)]
pub struct Request {
    request: AdmissionRequest<DynamicObject>,
    /// The pod as it was sent, but for its metadata.
    data: Value,
    pod: Pod,
    namespace: String,
}

/// What cannot be answered at all.
#[derive(Debug, thiserror::Error)]
pub enum InvalidRequest {
    #[error("this is no AdmissionReview of admission.k8s.io/v1: {0}")]
    Malformed(String),
    #[error("the review is about {0}; the webhook is for pods that are created")]
    NotAPod(String),
}

/// What became of a pod, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Injected,
    Skipped(Reason),
    Denied(String),
}

impl Request {
    pub fn parse(body: &[u8]) -> Result<Self, InvalidRequest> {
        let malformed = |text: &dyn ToString| InvalidRequest::Malformed(text.to_string());
        let review: AdmissionReview<DynamicObject> =
            serde_json::from_slice(body).map_err(|error| malformed(&error))?;
        if review.types.api_version != "admission.k8s.io/v1" {
            return Err(malformed(&format!("it is {}", review.types.api_version)));
        }
        let mut request: AdmissionRequest<DynamicObject> =
            review.try_into().map_err(|error| malformed(&error))?;
        let what = &request.resource;
        let is_pod = what.group.is_empty() && what.resource == "pods";
        let subresource = request.sub_resource.as_deref().unwrap_or_default();
        if !is_pod || !subresource.is_empty() || request.operation != Operation::Create {
            let text = format!("{:?} of {} {subresource}", request.operation, what.resource);
            return Err(InvalidRequest::NotAPod(text));
        }
        let object = request
            .object
            .take()
            .ok_or_else(|| malformed(&"it has no object"))?;
        let value = serde_json::to_value(&object).map_err(|error| malformed(&error))?;
        let mut pod: Pod = serde_json::from_value(value).map_err(|error| malformed(&error))?;
        // The object may not say in which namespace it is created; the request does.
        let namespace = request.namespace.clone().unwrap_or_default();
        pod.metadata.namespace = Some(namespace.clone());
        Ok(Self {
            request,
            data: object.data,
            pod,
            namespace,
        })
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The pod's name, or what its name will begin with.
    pub fn pod_name(&self) -> &str {
        let metadata = &self.pod.metadata;
        let name = metadata.name.as_deref().filter(|name| !name.is_empty());
        name.or(metadata.generate_name.as_deref())
            .unwrap_or_default()
    }

    /// The answer, and what it says.
    pub fn answer(
        &self,
        namespace_labels: &BTreeMap<String, String>,
        config: &InjectConfig,
    ) -> (Vec<u8>, Outcome) {
        let response = AdmissionResponse::from(&self.request);
        match inject(&self.pod, namespace_labels, config) {
            Ok(Injection::Injected(_)) => {
                let annotated = self.pod.metadata.annotations.is_some();
                let patch = patch(&self.data, annotated, config);
                match response.with_patch(patch) {
                    Ok(response) => (bytes(response), Outcome::Injected),
                    Err(error) => self.deny(&error.to_string(), 500),
                }
            }
            Ok(Injection::Skipped(reason)) => {
                let mut response = response;
                if let Some(warning) = self.warning(&reason) {
                    response.warnings = Some(vec![warning]);
                }
                (bytes(response), Outcome::Skipped(reason))
            }
            Err(refused) => self.deny(&refused.to_string(), 422),
        }
    }

    /// The pod is not created.
    pub fn deny(&self, why: &str, code: u16) -> (Vec<u8>, Outcome) {
        let text = format!("turnpike: {why}");
        let mut response = AdmissionResponse::from(&self.request).deny(&text);
        response.result.code = code;
        (bytes(response), Outcome::Denied(text))
    }

    /// For whoever creates a pod and may not have meant it to go without.
    fn warning(&self, reason: &Reason) -> Option<String> {
        match reason {
            Reason::HostNetwork | Reason::Windows | Reason::PodOptedOut => Some(format!(
                "turnpike: pod {} gets no sidecar: {reason}",
                self.pod_name()
            )),
            Reason::ExemptNamespace(_) | Reason::NamespaceNotLabelled(_) => None,
        }
    }
}

fn bytes(response: AdmissionResponse) -> Vec<u8> {
    serde_json::to_vec(&response.into_review())
        // It consists of texts, numbers and lists.
        .expect("a review is always JSON")
}

/// What makes the injected pod of the one whose fields are `data`. In the order of its operations:
/// ours of an earlier round are removed from the end, so that places stay right, then added anew.
fn patch(data: &Value, annotated: bool, config: &InjectConfig) -> Patch {
    let mut operations = Vec::new();
    let list = |name: &str| {
        let list = data.get("spec").and_then(|spec| spec.get(name));
        list.and_then(Value::as_array)
    };
    let named = |item: &Value, name: &str| item.get("name").and_then(Value::as_str) == Some(name);

    let inits = list("initContainers");
    remove(&mut operations, "initContainers", inits, &|item| {
        named(item, CONTAINER)
    });
    let sidecar = sidecar::container(config);
    add(
        &mut operations,
        "initContainers",
        inits.is_some(),
        &sidecar,
        "0",
    );

    let (old, new) = (list("volumes"), sidecar::volumes(config));
    remove(&mut operations, "volumes", old, &|item| {
        new.iter().any(|volume| named(item, &volume.name))
    });
    for (index, volume) in new.iter().enumerate() {
        let there = old.is_some() || index > 0;
        add(&mut operations, "volumes", there, volume, "-");
    }

    let mark = json!("true");
    operations.push(if annotated {
        operation(["metadata", "annotations", INJECTED], mark)
    } else {
        operation(["metadata", "annotations"], json!({ INJECTED: mark }))
    });
    Patch(operations)
}

fn remove(
    operations: &mut Vec<PatchOperation>,
    list: &str,
    items: Option<&Vec<Value>>,
    ours: &dyn Fn(&Value) -> bool,
) {
    let items = items.map(Vec::as_slice).unwrap_or_default();
    for (index, item) in items.iter().enumerate().rev() {
        if ours(item) {
            let path = PointerBuf::from_tokens(["spec", list, &index.to_string()]);
            operations.push(PatchOperation::Remove(RemoveOperation { path }));
        }
    }
}

/// Puts an item into a list, which may have to be made.
fn add(
    operations: &mut Vec<PatchOperation>,
    list: &str,
    there: bool,
    item: &impl serde::Serialize,
    place: &str,
) {
    let item = serde_json::to_value(item).expect("containers and volumes are always JSON");
    operations.push(if there {
        operation(["spec", list, place], item)
    } else {
        operation(["spec", list], json!([item]))
    });
}

fn operation<const N: usize>(path: [&str; N], value: Value) -> PatchOperation {
    let path = PointerBuf::from_tokens(path);
    PatchOperation::Add(AddOperation { path, value })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inject::LABEL;

    fn review(namespace: &str, pod: &Value) -> Vec<u8> {
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "u-1", "operation": "CREATE", "namespace": namespace, "name": "",
                "kind": {"group": "", "version": "v1", "kind": "Pod"},
                "resource": {"group": "", "version": "v1", "resource": "pods"},
                "userInfo": {}, "object": pod, "oldObject": null, "dryRun": false,
            },
        });
        serde_json::to_vec(&review).unwrap()
    }

    fn enabled() -> BTreeMap<String, String> {
        BTreeMap::from([(LABEL.to_owned(), "enabled".to_owned())])
    }

    fn answered(pod: &Value) -> (Value, Outcome) {
        let request = Request::parse(&review("shop", pod)).unwrap();
        let (bytes, outcome) = request.answer(&enabled(), &InjectConfig::default());
        let answer: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(answer["response"]["uid"], "u-1");
        (answer["response"].clone(), outcome)
    }

    /// The pod as the API server makes it of our answer.
    fn patched(pod: &Value) -> Value {
        let (response, outcome) = answered(pod);
        assert_eq!(outcome, Outcome::Injected);
        assert_eq!(
            (&response["allowed"], &response["patchType"]),
            (&json!(true), &json!("JSONPatch"))
        );
        let patch: Vec<u8> = serde_json::from_value(response["patch"].clone()).unwrap();
        let patch: Patch = serde_json::from_slice(&patch).unwrap();
        let mut result = pod.clone();
        json_patch::patch(&mut result, &patch).unwrap();
        result
    }

    fn pod(metadata: Value, spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    }

    #[test]
    fn a_pod_whose_name_is_yet_to_be_made_is_injected() {
        let of_replica_set = pod(
            json!({"generateName": "web-5d4-"}),
            json!({"containers": [{"name": "a"}], "shiny": {"new": "field"}}),
        );
        let result = patched(&of_replica_set);
        assert_eq!(result["spec"]["initContainers"][0]["name"], CONTAINER);
        assert_eq!(
            result["spec"]["shiny"]["new"], "field",
            "what is not known stays"
        );
        assert_eq!(
            result["metadata"],
            json!({
                "generateName": "web-5d4-", "annotations": {INJECTED: "true"},
            })
        );
        let request = Request::parse(&review("shop", &of_replica_set)).unwrap();
        assert_eq!(
            (request.namespace(), request.pod_name()),
            ("shop", "web-5d4-")
        );
    }

    #[test]
    fn who_goes_without_is_warned_and_who_would_escape_is_denied() {
        let host = pod(
            json!({"name": "h"}),
            json!({"hostNetwork": true, "containers": []}),
        );
        let (response, _) = answered(&host);
        assert_eq!(response["allowed"], true);
        assert_eq!(response.get("patch"), None);
        let warning = response["warnings"][0].as_str().unwrap();
        assert!(
            warning.starts_with("turnpike: pod h gets no sidecar: the pod uses"),
            "{warning}"
        );

        let labels = json!({"name": "o", "labels": {LABEL: "disabled"}});
        let (response, outcome) = answered(&pod(labels, json!({"containers": []})));
        assert_eq!(outcome, Outcome::Skipped(Reason::PodOptedOut));
        assert!(
            response["warnings"][0]
                .as_str()
                .unwrap()
                .contains("`disabled`")
        );

        let user = json!({"runAsUser": 1337});
        let spec = json!({"containers": [{"name": "a", "securityContext": user}]});
        let (response, _) = answered(&pod(json!({"name": "e"}), spec));
        assert_eq!(response["allowed"], false);
        let message = response["status"]["message"].as_str().unwrap();
        assert!(
            message.starts_with("turnpike: container `a` runs as user 1337"),
            "{message}"
        );
    }

    #[test]
    fn what_is_no_pod_being_created_is_not_answered() {
        let pod = pod(json!({"name": "a"}), json!({"containers": []}));
        let body = review("shop", &pod);
        let with = |pointer: &str, value: Value| {
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            *review.pointer_mut(pointer).unwrap() = value;
            Request::parse(&serde_json::to_vec(&review).unwrap())
        };
        assert!(with("/request/uid", json!("u-2")).is_ok());
        for (pointer, value) in [
            ("/apiVersion", json!("admission.k8s.io/v1beta1")),
            ("/request", Value::Null),
            ("/request/operation", json!("DELETE")),
            ("/request/resource/resource", json!("secrets")),
            ("/request/object", Value::Null),
            ("/request/object/spec", json!({"containers": 1})),
        ] {
            assert!(with(pointer, value).is_err(), "{pointer}");
        }
        assert!(Request::parse(b"").is_err());
    }

    fn name() -> impl Strategy<Value = &'static str> {
        prop_oneof![
            Just("a"),
            Just("b"),
            Just(CONTAINER),
            Just("turnpike-token"),
            Just("turnpike-state")
        ]
    }

    fn items(unknown: &'static str) -> impl Strategy<Value = Option<Vec<Value>>> {
        let item =
            (name(), any::<u8>()).prop_map(move |(name, n)| json!({"name": name, unknown: n}));
        proptest::option::of(proptest::collection::vec(item, 0..4))
    }

    proptest! {
        /// Applied to the pod as it was sent, the patch makes what injection makes; asked again
        /// about that, it changes nothing; and what it does not know it leaves.
        #[test]
        fn the_patch_is_the_injection(
            inits in items("shinyInit"),
            volumes in items("shinyVolume"),
            annotations in proptest::option::of(proptest::collection::btree_map("[a-z]{1,3}", "[a-z]", 0..3)),
        ) {
            let mut spec = json!({"containers": [{"name": "app"}]});
            if let Some(inits) = &inits { spec["initContainers"] = json!(inits); }
            if let Some(volumes) = &volumes { spec["volumes"] = json!(volumes); }
            let mut metadata = json!({"name": "p"});
            if let Some(annotations) = &annotations { metadata["annotations"] = json!(annotations); }
            let original = pod(metadata, spec);
            let result = patched(&original);

            let typed = |value: &Value| serde_json::from_value::<Pod>(value.clone()).unwrap();
            let expected = inject(&typed(&original), &enabled(), &InjectConfig::default()).unwrap();
            prop_assert_eq!(Injection::Injected(Box::new(typed(&result))), expected);
            prop_assert_eq!(&patched(&result), &result);
            let others = |value: &Value, list: &str, unknown: &str| {
                let list = value["spec"][list].as_array().cloned().unwrap_or_default();
                list.iter().filter(|item| item.get(unknown).is_some()).cloned().collect::<Vec<_>>()
            };
            let kept = |list: &Option<Vec<Value>>, ours: &[&str]| {
                let list = list.clone().unwrap_or_default();
                list.into_iter()
                    .filter(|item| !ours.contains(&item["name"].as_str().unwrap()))
                    .collect::<Vec<_>>()
            };
            prop_assert_eq!(others(&result, "initContainers", "shinyInit"), kept(&inits, &[CONTAINER]));
            let ours = ["turnpike-token", "turnpike-state"];
            prop_assert_eq!(others(&result, "volumes", "shinyVolume"), kept(&volumes, &ours));
        }
    }
}
