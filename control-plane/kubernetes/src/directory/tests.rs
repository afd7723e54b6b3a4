use std::{fs, time::Duration};

use tokio::time::timeout;

use super::*;

const POLICY: &str = "apiVersion: turnpike.dev/v1alpha1
kind: EgressPolicy
metadata: {name: payments, namespace: shop}
spec:
  allow:
  - hosts: [api.payments.example]
    ports: [{port: 443, protocol: TLS}]
";

/// The next event, as a text.
async fn next(source: &mut DirectorySource) -> String {
    let event = timeout(Duration::from_secs(20), source.next()).await;
    match event.expect("an event within 20 s").unwrap() {
        Event::Applied(object) => format!("applied {}", object.key()),
        Event::Deleted(key) => format!("deleted {key}"),
        Event::Rejected(rejection) => format!("rejected {rejection}"),
        Event::Resolved(rejection) => format!("resolved {}", rejection.file),
        Event::Synced => "synced".to_owned(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn changes_of_files_are_events() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("egress.yaml"), POLICY).unwrap();
    fs::write(at("notes.txt"), "not read").unwrap();
    fs::write(at(".hidden.yaml"), "not: read").unwrap();
    let mut source = DirectorySource::start(folder.path()).unwrap();
    assert_eq!(
        next(&mut source).await,
        "applied EgressPolicy shop/payments"
    );
    assert_eq!(next(&mut source).await, "synced");

    fs::write(at("egress.yaml"), POLICY.replace("443", "8443")).unwrap();
    assert_eq!(
        next(&mut source).await,
        "applied EgressPolicy shop/payments"
    );

    fs::write(at("egress.yaml"), POLICY.replace("hosts:", "host:")).unwrap();
    assert_eq!(
        next(&mut source).await,
        "rejected egress.yaml:6: EgressPolicy shop/payments: spec.allow[0].host: unknown field; \
         did you mean `hosts`? Allowed are cidrs, hosts, http, ports, tls (its last good version \
         stays in force)"
    );
    fs::write(at("egress.yaml"), POLICY.replace("443", "8443")).unwrap();
    assert_eq!(
        next(&mut source).await,
        "resolved egress.yaml",
        "and nothing else: it is the same"
    );

    // As an editor does: the new file takes the old one's place.
    fs::write(at("new"), POLICY.replace("443", "9443")).unwrap();
    fs::rename(at("new"), at("egress.yaml")).unwrap();
    assert_eq!(
        next(&mut source).await,
        "applied EgressPolicy shop/payments"
    );

    // Renamed within one look: nothing changes, and it never goes missing.
    fs::rename(at("egress.yaml"), at("other.yml")).unwrap();
    fs::write(
        at("zz.json"),
        r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}"#,
    )
    .unwrap();
    assert_eq!(next(&mut source).await, "applied Namespace x");

    fs::remove_file(at("other.yml")).unwrap();
    assert_eq!(
        next(&mut source).await,
        "deleted EgressPolicy shop/payments"
    );
}

#[tokio::test]
async fn unreadable_files_take_nothing_away() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("egress.yaml");
    fs::write(&file, POLICY).unwrap();
    let mut source = DirectorySource::start(folder.path()).unwrap();
    assert_eq!(
        next(&mut source).await,
        "applied EgressPolicy shop/payments"
    );
    assert_eq!(next(&mut source).await, "synced");
    fs::write(&file, b"\xff\xfe").unwrap();
    assert_eq!(
        next(&mut source).await,
        "rejected egress.yaml:1: it is not UTF-8 at byte 0 (what the file held before stays in \
         force)"
    );
    let away = folder.path().with_extension("away");
    fs::rename(folder.path(), &away).unwrap();
    let rejected = next(&mut source).await;
    assert!(
        rejected.starts_with("rejected .: the folder cannot be read"),
        "{rejected}"
    );
    fs::rename(&away, folder.path()).unwrap();
    assert_eq!(next(&mut source).await, "resolved .");
}

#[tokio::test]
async fn an_empty_folder_is_in_sync_and_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = DirectorySource::start(folder.path()).unwrap();
    assert_eq!(next(&mut source).await, "synced");
    let error = DirectorySource::start(folder.path().join("none")).unwrap_err();
    assert!(error.to_string().ends_with("none is not a folder"));
}

/// Truncated and written again, many times over: the policy is never gone.
#[tokio::test]
async fn a_file_in_the_middle_of_a_write_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("egress.yaml");
    fs::write(&file, POLICY).unwrap();
    let mut source = DirectorySource::start(folder.path()).unwrap();
    assert_eq!(
        next(&mut source).await,
        "applied EgressPolicy shop/payments"
    );
    assert_eq!(next(&mut source).await, "synced");
    let writer = thread::spawn(move || {
        for i in 0..400 {
            fs::write(&file, "").unwrap();
            thread::sleep(Duration::from_micros(500));
            fs::write(&file, POLICY.replace("443", &(1000 + i).to_string())).unwrap();
            thread::sleep(Duration::from_micros(500));
        }
        fs::write(&file, POLICY.replace("443", "9999")).unwrap();
    });
    loop {
        match timeout(Duration::from_secs(20), source.next())
            .await
            .expect("an event")
            .unwrap()
        {
            Event::Applied(object) => {
                let text = format!("{object:?}");
                if text.contains("9999") {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    writer.join().unwrap();
}
