//! What is kept beside a lease: how the pod's network was made, so that a restarted agent takes it
//! over without asking anybody.

use serde::{Deserialize, Serialize};
use turnpike_datapath::{Applied, PodPolicy};
use turnpike_rules::pod::{Capture, InboundPort, PodNetwork, Transport};

/// A pod's policy as far as the node enforces it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enforced {
    pub service_account: String,
    /// The pod's uid, as the control plane says.
    pub uid: String,
    pub capture: Option<Capture>,
    pub policy: PodPolicy,
}

impl From<&PodNetwork> for Enforced {
    fn from(network: &PodNetwork) -> Self {
        Self {
            service_account: network.identity.service_account().to_owned(),
            uid: network.uid.to_string(),
            capture: network.capture.clone(),
            policy: PodPolicy {
                selected: network.selected,
                inbound: network.inbound.clone(),
            },
        }
    }
}

/// A pod whose ADD has come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    pub applied: Applied,
    pub enforced: Enforced,
}

impl Note {
    pub fn write(&self) -> String {
        serde_json::to_string(&Kept::from(self)).expect("a note holds only plain data")
    }

    /// None for a note of a form that this version does not know.
    pub fn read(text: &str) -> Option<Self> {
        Some(serde_json::from_str::<Kept>(text).ok()?.into())
    }
}

#[derive(Serialize, Deserialize)]
struct Kept {
    applied: Applied,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    uid: String,
    capture: Option<KeptCapture>,
    selected: bool,
    /// `(udp, port)`.
    inbound: Vec<(bool, u16)>,
}

#[derive(Serialize, Deserialize)]
struct KeptCapture {
    proxy_uid: u32,
    outbound_port: u16,
    inbound_port: u16,
    probe_ports: Vec<u16>,
}

impl From<&Note> for Kept {
    fn from(note: &Note) -> Self {
        let Note { applied, enforced } = note;
        let Enforced {
            service_account,
            uid,
            capture,
            policy,
        } = enforced;
        let capture = capture.clone().map(|capture| {
            let Capture {
                proxy_uid,
                outbound_port,
                inbound_port,
                probe_ports,
            } = capture;
            KeptCapture {
                proxy_uid,
                outbound_port,
                inbound_port,
                probe_ports,
            }
        });
        let inbound = policy.inbound.iter();
        Self {
            applied: applied.clone(),
            service_account: service_account.clone(),
            uid: uid.clone(),
            capture,
            selected: policy.selected,
            inbound: inbound
                .map(|it| (it.transport == Transport::Udp, it.port))
                .collect(),
        }
    }
}

impl From<Kept> for Note {
    fn from(kept: Kept) -> Self {
        let Kept {
            applied,
            service_account,
            uid,
            capture,
            selected,
            inbound,
        } = kept;
        let capture = capture.map(|capture| {
            let KeptCapture {
                proxy_uid,
                outbound_port,
                inbound_port,
                probe_ports,
            } = capture;
            Capture {
                proxy_uid,
                outbound_port,
                inbound_port,
                probe_ports,
            }
        });
        let inbound = inbound.into_iter().map(|(udp, port)| InboundPort {
            transport: if udp { Transport::Udp } else { Transport::Tcp },
            port,
        });
        let policy = PodPolicy {
            selected,
            inbound: inbound.collect(),
        };
        Self {
            applied,
            enforced: Enforced {
                service_account,
                uid,
                capture,
                policy,
            },
        }
    }
}
