//! The injector's settings file, followed.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::watch;
use turnpike_kubernetes::{
    Impairment, Impairments,
    inject::{InjectConfig, InvalidConfig},
};

/// Kubelet changes a mounted ConfigMap within a minute; the file itself is small.
const INTERVAL: Duration = Duration::from_secs(1);
const MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("`{}`: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{}`: {source}", path.display())]
    Invalid {
        path: PathBuf,
        source: InvalidConfig,
    },
}

/// Follows one file. Settings that cannot be used leave the previous ones in force.
#[derive(Debug)]
pub struct SettingsFile {
    path: PathBuf,
    /// As it was read last, good or not.
    text: String,
    settings: watch::Sender<Arc<InjectConfig>>,
    impairments: Impairments,
}

impl SettingsFile {
    /// Reads the file once, so that a wrong one is found at the start.
    pub fn open(path: PathBuf, impairments: Impairments) -> Result<Self, SettingsError> {
        let text = read(&path).map_err(|source| SettingsError::Io {
            path: path.clone(),
            source,
        })?;
        let config = InjectConfig::parse(&text).map_err(|source| SettingsError::Invalid {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            text,
            settings: watch::Sender::new(Arc::new(config)),
            impairments,
        })
    }

    /// What is in force.
    pub fn settings(&self) -> watch::Receiver<Arc<InjectConfig>> {
        self.settings.subscribe()
    }

    /// Follows it for as long as it is polled.
    pub async fn follow(mut self) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            self.look();
        }
    }

    fn look(&mut self) {
        let what = format!("injector settings {}", self.path.display());
        let problem = match read(&self.path) {
            Ok(text) if text == self.text => return,
            Ok(text) => {
                let parsed = InjectConfig::parse(&text);
                self.text = text;
                match parsed {
                    Ok(config) => {
                        tracing::info!(image = config.image, "the injector has new settings");
                        self.settings.send_replace(Arc::new(config));
                        None
                    }
                    Err(error) => Some(error.to_string()),
                }
            }
            Err(error) => {
                // So that it is looked at again when it is back.
                self.text.clear();
                Some(error.to_string())
            }
        };
        let found = problem.map(|problem| Impairment {
            what: what.clone(),
            message: format!("{problem}; the settings before stay in force"),
            blocking: false,
        });
        self.impairments.set(&what, found);
    }
}

fn read(path: &PathBuf) -> std::io::Result<String> {
    let length = fs::metadata(path)?.len();
    if length > MAX_BYTES {
        let text = format!("it has {length} bytes; allowed are {MAX_BYTES}");
        return Err(std::io::Error::other(text));
    }
    fs::read_to_string(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_used_leave_the_previous_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inject.yaml");
        let impairments = Impairments::default();
        let open = || SettingsFile::open(path.clone(), impairments.clone());
        assert!(matches!(open(), Err(SettingsError::Io { .. })));
        fs::write(&path, "imag: x").unwrap();
        assert!(matches!(open(), Err(SettingsError::Invalid { .. })));
        fs::write(&path, "image: proxy:1").unwrap();
        let mut file = open().unwrap();
        let settings = file.settings();
        let image = || settings.borrow().image.clone();

        let mut after = |text: Option<&str>| {
            match text {
                Some(text) => fs::write(&path, text).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            file.look();
            let problems = impairments.all().into_iter().map(|found| found.to_string());
            (image(), problems.collect::<Vec<_>>())
        };
        assert_eq!(after(Some("image: proxy:2")), ("proxy:2".into(), vec![]));
        let (image, problems) = after(Some("image: proxy:3\nworker: 2"));
        assert_eq!(image, "proxy:2");
        assert!(
            problems[0].contains("unknown field `worker`")
                && problems[0].ends_with("; the settings before stay in force"),
            "{problems:?}"
        );
        assert_eq!(after(None).0, "proxy:2");
        assert_eq!(after(Some("image: proxy:3")), ("proxy:3".into(), vec![]));
    }
}
