//! What a container runtime executes: one CNI command in, one call to the node's agent, one answer
//! out. It decides nothing and touches no network itself.
//!
//! 1. [`input`] reads the environment and standard input, and refuses what is malformed before
//!    anything happens;
//! 2. [`agent`] makes the one gRPC call, on a Unix socket, with a deadline;
//! 3. [`output`] compares what CHECK finds with what ADD had answered ([`previous`]), and shapes the
//!    answer for the version of the specification that the configuration names (0.4.0, 1.0.0 or
//!    1.1.0); [`error`] holds the specification's error codes;
//! 4. [`tombstone`] notes a DEL that found no agent, so that pods can be deleted while it is away.

pub mod agent;
pub mod error;
pub mod input;
pub mod output;
pub mod previous;
pub mod tombstone;

use std::time::SystemTime;

use serde_json::Value;

use crate::{
    agent::Agent,
    error::{CniError, Code},
    input::{Command, Environment, Invocation},
    tombstone::Tombstone,
};

/// Runs the command. What it returns goes to standard output; None prints nothing.
pub async fn run(
    environment: &Environment,
    stdin: &[u8],
    now: SystemTime,
) -> Result<Option<Value>, CniError> {
    let invocation = input::parse(environment, stdin)?;
    let agent = || Agent::new(&invocation);
    match &invocation.command {
        Command::Version => Ok(Some(output::versions(&invocation.cni_version))),
        Command::Add(attachment) => {
            let reply = agent().add(attachment).await?;
            output::added(&invocation, attachment, &reply).map(Some)
        }
        Command::Check(attachment, expected) => {
            let found = agent().check(attachment).await;
            found.and_then(|found| output::checked(&invocation, attachment, expected, &found))?;
            Ok(None)
        }
        Command::Del(attachment) => delete(&invocation, attachment, now).await.map(|()| None),
        Command::Status => agent().status().await.map(|()| None),
        Command::Gc(valid) => agent().gc(valid).await.map(|()| None),
    }
}

/// A pod's deletion does not wait for an agent: it is noted and made good later.
async fn delete(
    invocation: &Invocation,
    attachment: &input::Attachment,
    now: SystemTime,
) -> Result<(), CniError> {
    let refusal = match Agent::new(invocation).del(attachment).await {
        Err(error) if error.code == Code::TRY_AGAIN_LATER => error,
        answered => return answered,
    };
    let tombstone = Tombstone::new(&invocation.config.name, attachment, now);
    tombstone
        .write(&invocation.config.agent_socket)
        .map_err(|error| {
            let message = format!("the agent cannot be reached and {error}");
            CniError::new(Code::IO, message, refusal.details)
        })
}
