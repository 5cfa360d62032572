//! Which service a call belongs to: by the first part of its path.

use std::convert::Infallible;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::util::BoxCloneService;
use tower::{Service, ServiceExt};

type Call = BoxCloneService<Request<Body>, Response<Body>, Infallible>;

/// All services of one server.
#[derive(Clone, Default)]
pub(super) struct Router {
    services: Vec<(&'static str, Call)>,
}

impl Router {
    /// Adds a generated service under its full name; such services are always ready.
    pub(super) fn with<S>(mut self, name: &'static str, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        self.services.push((name, service.boxed_clone()));
        self
    }
}

impl Service<Request<Body>> for Router {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = <Call as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let name = request.uri().path().split('/').nth(1);
        match self.services.iter_mut().find(|(n, _)| Some(*n) == name) {
            Some((_, service)) => service.call(request),
            None => Box::pin(async { Ok(Status::unimplemented("").into_http()) }),
        }
    }
}
