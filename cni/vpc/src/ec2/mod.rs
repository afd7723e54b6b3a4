//! The EC2 Query API, version 2016-11-15: a form in, XML out.
//!
//! A request is read ([`params`]), its signature looked at ([`auth`]), its action's bucket asked
//! (`RequestLimitExceeded`), delayed or failed as the spec has it, and then answered from the
//! world ([`describe`]) or carried into it ([`mutate`]). Errors have EC2's codes and form.

mod auth;
mod describe;
mod filter;
mod mutate;
mod params;
mod xml;

pub(crate) use self::describe::private_name;

use std::{net::SocketAddr, sync::Arc};

use http::{Method, Request, Response};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;

use self::params::Params;
use crate::{
    cloud::Cloud,
    http::{Body, respond},
    world::Refusal,
};

/// Larger than any request that EC2 takes.
const MAX_REQUEST: usize = 1 << 20;

/// Answers one HTTP request.
pub(crate) async fn answer(
    cloud: Arc<Cloud>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let form = match head.method {
        Method::POST => match Limited::new(body, MAX_REQUEST).collect().await {
            Ok(body) => body.to_bytes().to_vec(),
            Err(_) => return respond(413, "text/plain", "request too large or cut short"),
        },
        Method::GET => head.uri.query().unwrap_or_default().as_bytes().to_vec(),
        _ => return respond(405, "text/plain", "use POST or GET"),
    };
    let params = Params::parse(&form);
    let action = params.get("Action").unwrap_or_default();
    let result = Box::pin(call(&cloud, action, &head, &params)).await;
    let request_id = uuid::Uuid::new_v4();
    match result {
        Ok(body) => {
            tracing::debug!(%peer, action, "answered");
            respond(
                200,
                "text/xml;charset=UTF-8",
                xml::success(action, request_id, &body),
            )
        }
        Err(refusal) => {
            tracing::info!(%peer, action, %refusal, "refused");
            let body = xml::failure(request_id, &refusal);
            respond(status(&refusal), "text/xml;charset=UTF-8", body)
        }
    }
}

async fn call(
    cloud: &Arc<Cloud>,
    action: &str,
    head: &http::request::Parts,
    params: &Params,
) -> Result<String, Refusal> {
    if !describe::knows(action) && !mutate::knows(action) {
        return Err(Refusal::unknown_action(action));
    }
    auth::check(head, &cloud.credentials, cloud.now())?;
    if !cloud.admit(action) {
        return Err(Refusal::throttled());
    }
    if cloud.misbehave().await {
        return Err(Refusal::internal());
    }
    if describe::knows(action) {
        params.refuse_dry_run()?;
        return describe::answer(action, &cloud.described(), params, &|at| cloud.wall(at));
    }
    // In a task of its own: a caller that goes away must not stop a change halfway.
    let (cloud, action, params) = (Arc::clone(cloud), action.to_owned(), params.clone());
    let changed = tokio::spawn(async move { mutate::answer(&cloud, &action, &params).await });
    changed.await.unwrap_or_else(|error| {
        tracing::error!(%error, "a change failed");
        Err(Refusal::internal())
    })
}

fn status(refusal: &Refusal) -> u16 {
    match refusal.code {
        "RequestLimitExceeded" => 503,
        "InternalError" => 500,
        "UnauthorizedOperation" => 403,
        "DryRunOperation" => 412,
        _ => 400,
    }
}
