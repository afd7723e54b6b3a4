//! Who this machine is: from metadata, and from disk while metadata is silent.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};
use turnpike_cloud::{Cloud, CloudError, Instance, TypeLimits};
use turnpike_ipam::Limits;

const FILE: &str = "instance.json";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub instance: Instance,
    pub limits: TypeLimits,
}

#[derive(Debug, thiserror::Error)]
#[error("this machine's identity is not known: {source}; and the state folder holds none for it")]
pub struct IdentityError {
    #[from]
    source: CloudError,
}

impl Identity {
    /// Asks metadata, and EC2 for the limits of a type not seen before. What was learned is kept,
    /// so that a restart needs neither.
    pub async fn learn<C: Cloud>(cloud: &C, state: &Path) -> Result<Self, IdentityError> {
        let kept = read(state);
        let instance = match (cloud.instance().await, &kept) {
            (Ok(instance), _) => instance,
            (Err(error), Some(kept)) => {
                tracing::warn!(%error, "metadata is silent; the identity on disk is used");
                return Ok(kept.clone());
            }
            (Err(error), None) => return Err(error.into()),
        };
        let same_type = |kept: &&Self| kept.instance.instance_type == instance.instance_type;
        let limits = match kept.as_ref().filter(same_type) {
            Some(kept) => kept.limits,
            None => cloud.limits(&instance.instance_type).await?,
        };
        let identity = Self { instance, limits };
        if kept.as_ref() != Some(&identity)
            && let Err(error) = write(state, &identity)
        {
            tracing::warn!(%error, "the identity was not kept: a restart will need metadata");
        }
        Ok(identity)
    }

    pub fn pool_limits(&self) -> Limits {
        let TypeLimits {
            interfaces,
            addresses_per_interface,
        } = self.limits;
        Limits {
            enis: interfaces,
            addresses_per_eni: addresses_per_interface,
        }
    }
}

fn read(state: &Path) -> Option<Identity> {
    serde_json::from_slice(&fs::read(state.join(FILE)).ok()?).ok()
}

fn write(state: &Path, identity: &Identity) -> io::Result<()> {
    fs::create_dir_all(state)?;
    let new = state.join(format!("{FILE}.new"));
    fs::write(&new, serde_json::to_vec_pretty(identity)?)?;
    fs::rename(&new, state.join(FILE))
}
