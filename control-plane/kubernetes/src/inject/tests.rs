use super::*;

fn pod(yaml: &str) -> Pod {
    serde_saphyr::from_str(yaml).unwrap()
}

fn enabled() -> BTreeMap<String, String> {
    BTreeMap::from([(LABEL.to_owned(), "enabled".to_owned())])
}

fn injected(yaml: &str) -> Pod {
    match inject(&pod(yaml), &enabled(), &InjectConfig::default()).unwrap() {
        Injection::Injected(pod) => *pod,
        Injection::Skipped(reason) => panic!("{reason}"),
    }
}

fn yaml(pod: &Pod) -> String {
    serde_saphyr::to_string(&serde_json::to_value(pod).unwrap()).unwrap()
}

const WEB: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  serviceAccountName: web
  initContainers:
  - {name: migrate, image: web}
  containers:
  - name: web
    image: web
    ports: [{containerPort: 8080}]
  volumes:
  - {name: data, emptyDir: {}}
";

#[test]
fn the_sidecar_comes_first() {
    insta::assert_snapshot!(yaml(&injected(WEB)));
}

#[test]
fn settings_reach_the_sidecar() {
    let config = InjectConfig {
        image: "registry.example/proxy:1".to_owned(),
        otlp_endpoint: Some("http://otel:4317".to_owned()),
        workers: Some(2),
        cpu_limit: Some("2".to_owned()),
        memory_limit: "1Gi".to_owned(),
        ..InjectConfig::default()
    };
    let minimal = pod("{metadata: {name: a}, spec: {containers: [{name: a}]}}");
    let Injection::Injected(pod) = inject(&minimal, &enabled(), &config).unwrap() else {
        panic!()
    };
    insta::assert_snapshot!(yaml(&pod));
}

#[test]
fn twice_is_once() {
    let once = injected(WEB);
    let config = InjectConfig::default();
    let twice = inject(&once, &enabled(), &config).unwrap();
    assert_eq!(twice, Injection::Injected(Box::new(once.clone())));

    // Another mutation put its container first, and the server filled in defaults.
    let mut touched = once.clone();
    let inits = touched
        .spec
        .as_mut()
        .unwrap()
        .init_containers
        .as_mut()
        .unwrap();
    inits[0].image_pull_policy = Some("Always".to_owned());
    inits.swap(0, 1);
    let again = inject(&touched, &enabled(), &config).unwrap();
    assert_eq!(again, Injection::Injected(Box::new(once)));
}

#[test]
fn who_goes_without_is_told_why() {
    let labels = |value: &str| BTreeMap::from([(LABEL.to_owned(), value.to_owned())]);
    let skipped = |yaml: &str, labels: &BTreeMap<String, String>| match inject(
        &pod(yaml),
        labels,
        &InjectConfig::default(),
    )
    .unwrap()
    {
        Injection::Skipped(reason) => reason.to_string(),
        Injection::Injected(_) => "injected".to_owned(),
    };
    let plain = "{metadata: {name: a}, spec: {containers: [{name: a}]}}";
    assert_eq!(skipped(plain, &enabled()), "injected");
    for (yaml, labels, reason) in [
        (
            plain,
            BTreeMap::new(),
            "the namespace has no label turnpike.dev/inject; set it to `enabled`",
        ),
        (
            plain,
            labels("true"),
            "the namespace's label turnpike.dev/inject is `true`; set it to `enabled`",
        ),
        (
            "{metadata: {name: a, labels: {turnpike.dev/inject: disabled}}, spec: {containers: []}}",
            enabled(),
            "the pod's label turnpike.dev/inject is `disabled`",
        ),
        (
            "{metadata: {name: a}, spec: {hostNetwork: true, containers: []}}",
            enabled(),
            "the pod uses the node's network (hostNetwork: true), where nothing is captured",
        ),
        (
            "{metadata: {name: a}, spec: {os: {name: windows}, containers: []}}",
            enabled(),
            "the pod is for Windows nodes",
        ),
        (
            "{metadata: {name: a, namespace: kube-system}, spec: {containers: []}}",
            enabled(),
            "pods in the namespace kube-system are never injected",
        ),
    ] {
        assert_eq!(skipped(yaml, &labels), reason);
    }
}

#[test]
fn what_would_escape_capture_is_refused() {
    let refused = |spec: &str| {
        let yaml = format!("{{metadata: {{name: a}}, spec: {spec}}}");
        inject(&pod(&yaml), &enabled(), &InjectConfig::default()).map(|_| ())
    };
    let user = |name: &str| Err(Refused::ProxyUser(name.to_owned()));
    assert_eq!(
        refused("{containers: [{name: a, securityContext: {runAsUser: 1337}}]}"),
        user("a")
    );
    assert_eq!(
        refused("{securityContext: {runAsUser: 1337}, containers: [{name: b}]}"),
        user("b")
    );
    assert_eq!(
        refused(
            "{containers: [], initContainers: [{name: c, securityContext: {runAsUser: 1337}}]}"
        ),
        user("c")
    );
    assert_eq!(
        refused(
            "{securityContext: {runAsUser: 1337}, containers: [{name: b, securityContext: \
             {runAsUser: 1000}}]}"
        ),
        Ok(())
    );
    let port = Refused::ProxyPort {
        container: "a".to_owned(),
        port: 15001,
    };
    assert_eq!(
        refused("{containers: [{name: a, ports: [{containerPort: 15001}]}]}"),
        Err(port)
    );
    assert_eq!(
        refused("{containers: [{name: turnpike-proxy}]}"),
        Err(Refused::ProxyName)
    );
}

/// Pod Security `restricted`, as far as it is about a container and its volumes.
#[test]
fn the_sidecar_is_restricted() {
    let pod = injected(WEB);
    let spec = pod.spec.unwrap();
    let sidecar = &spec.init_containers.as_ref().unwrap()[0];
    assert_eq!(sidecar.restart_policy.as_deref(), Some("Always"));
    let context = sidecar.security_context.as_ref().unwrap();
    assert_eq!(context.allow_privilege_escalation, Some(false));
    assert_eq!(context.run_as_non_root, Some(true));
    assert_eq!(context.run_as_user, Some(1337));
    let capabilities = context.capabilities.as_ref().unwrap();
    assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
    assert_eq!(capabilities.add, None);
    assert_eq!(
        context.seccomp_profile.as_ref().unwrap().type_,
        "RuntimeDefault"
    );
    assert!(
        sidecar
            .ports
            .iter()
            .flatten()
            .all(|port| port.host_port.is_none())
    );
    for volume in spec.volumes.iter().flatten() {
        let allowed =
            volume.projected.is_some() || volume.config_map.is_some() || volume.empty_dir.is_some();
        assert!(allowed, "{}", volume.name);
    }
}
