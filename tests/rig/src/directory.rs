//! The folder of YAML that the controller reads, as a person or a pipeline would edit it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::Serialize;

/// A folder of objects, one file each or as a person wrote them.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    pub fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path)?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a file there in one step, so that no half of it is ever read.
    pub fn write(&self, name: &str, yaml: &str) -> Result<()> {
        let part = self.path.join(format!(".{name}.part"));
        fs::write(&part, yaml)?;
        let file = self.file(name);
        fs::rename(&part, &file).with_context(|| file.display().to_string())
    }

    pub fn read(&self, name: &str) -> Result<String> {
        let file = self.file(name);
        fs::read_to_string(&file).with_context(|| file.display().to_string())
    }

    /// Writes an object of Kubernetes' own types; JSON is YAML.
    pub fn write_object(&self, name: &str, object: &impl Serialize) -> Result<()> {
        self.write(name, &serde_json::to_string_pretty(object)?)
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        match fs::remove_file(self.file(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.yaml"))
    }
}
