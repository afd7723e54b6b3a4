//! Authentication in front of every service: no call reaches one without a caller.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use futures_util::future::BoxFuture;
use hyper::http::{Request, Response, header::AUTHORIZATION};
use tonic::body::Body;
use tower::{Layer, Service};

use super::{AuthError, Authenticator};
use crate::{metrics::Metrics, text::one_line};

#[derive(Clone)]
pub struct AuthenticateLayer {
    authenticator: Arc<dyn Authenticator>,
    metrics: Metrics,
}

impl std::fmt::Debug for AuthenticateLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthenticateLayer").finish_non_exhaustive()
    }
}

impl AuthenticateLayer {
    pub fn new(authenticator: Arc<dyn Authenticator>, metrics: Metrics) -> Self {
        Self {
            authenticator,
            metrics,
        }
    }
}

impl<S> Layer<S> for AuthenticateLayer {
    type Service = Authenticate<S>;

    fn layer(&self, inner: S) -> Authenticate<S> {
        Authenticate {
            layer: self.clone(),
            inner,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Authenticate<S> {
    layer: AuthenticateLayer,
    inner: S,
}

impl<S> Service<Request<Body>> for Authenticate<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let layer = self.layer.clone();
        // The service that is ready is the one to call; its clone takes its place.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            let caller = match bearer(&request) {
                Some(token) => {
                    layer
                        .authenticator
                        .authenticate(token, SystemTime::now())
                        .await
                }
                None => Err(AuthError::Missing),
            };
            match caller {
                Ok(caller) => {
                    request.headers_mut().remove(AUTHORIZATION);
                    request.extensions_mut().insert(Arc::new(caller));
                    inner.call(request).await
                }
                Err(error) => {
                    layer.metrics.unauthenticated(error.reason());
                    tracing::warn!(
                        target: "audit",
                        path = request.uri().path(),
                        reason = error.reason(),
                        "refused an unauthenticated call: {}",
                        // It may quote the token's header.
                        one_line(&error.to_string())
                    );
                    Ok(error.status().into_http())
                }
            }
        })
    }
}

fn bearer<B>(request: &Request<B>) -> Option<&str> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim())
        .filter(|token| !token.is_empty())
}
