//! `turnpike inject`: a Pod as it is after injection, without a cluster.

use std::{io::Read as _, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use turnpike_kubernetes::inject::{InjectConfig, Injection, inject};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A file with one Pod in YAML; `-` reads standard input
    file: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut text = String::new();
    if arguments.file.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text)?;
    } else {
        let file = &arguments.file;
        text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    }
    let pod: Pod = serde_saphyr::from_str(&text).context("this is not a Pod")?;
    let labels = [("turnpike.dev/inject".to_owned(), "enabled".to_owned())].into();
    match inject(&pod, &labels, &InjectConfig::default())? {
        Injection::Injected(pod) => {
            print!("{}", serde_saphyr::to_string(&*pod)?);
            Ok(ExitCode::SUCCESS)
        }
        Injection::Skipped(reason) => {
            eprintln!("not injected: {reason}");
            Ok(ExitCode::FAILURE)
        }
    }
}
