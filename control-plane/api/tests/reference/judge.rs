//! Asks the source that the controller reads from.

use std::fs;

use turnpike_kubernetes::{Event, Rejection, Source as _, directory::DirectorySource};

/// What is refused of a file with this text, each as field and message; empty: it is accepted.
pub(crate) fn judge(text: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("example.yaml"), text).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut source = DirectorySource::start(folder.path()).unwrap();
    runtime.block_on(async {
        let mut refusals = Vec::new();
        let mut applied = 0;
        loop {
            match source.next().await.unwrap() {
                Event::Applied(_) => applied += 1,
                Event::Rejected(Rejection { field, message, .. }) => {
                    // There is no earlier version here, which every message would say.
                    let message = message.trim_end_matches(" (nothing of it is in force)");
                    refusals.push(format!("`{}`: {message}", field.unwrap_or_default()));
                }
                Event::Synced => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(applied, usize::from(refusals.is_empty()), "{text}");
        refusals
    })
}
