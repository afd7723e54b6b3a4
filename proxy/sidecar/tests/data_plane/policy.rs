//! Routes, filters and authorization.

use std::sync::Arc;

use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use turnpike_rules::{
    ServiceKey,
    authz::{Authorization, Operation, Policy, Rule, Source, TextPattern},
    route::{
        Backend, Filter, HeaderEdit, PathEdit, PathMatch, Redirect, Rewrite, Route, RouteMatch,
        RouteTable, RouteTimeouts,
    },
};
use turnpike_sidecar::observe::RefusalReason;

use crate::{
    apps::{Body, empty, exchange, full, get, http1, read, serve},
    world::{Pair, Setup, Trust, web},
};

async fn echo(request: Request<hyper::body::Incoming>) -> Response<Body> {
    let added = request
        .headers()
        .get("x-added")
        .map(|value| value.to_str().unwrap().to_owned());
    let host = request.headers()["host"].to_str().unwrap().to_owned();
    let uri = request.uri().clone();
    // A server that answers before it has read all closes, and the answer may be lost with it.
    request.into_body().collect().await.unwrap();
    Response::new(full(format!("{host} {uri} {added:?}")))
}

fn route(name: &str, prefix: &str, backends: &[(&str, u32)]) -> Route {
    Route {
        name: name.into(),
        matches: RouteMatch {
            path: PathMatch::prefix(prefix),
            ..RouteMatch::default()
        },
        filters: Vec::new(),
        backends: backends
            .iter()
            .map(|(service, weight)| Backend {
                to: Some((ServiceKey::new("cluster", "shop", service), 80)),
                weight: *weight,
                filters: Vec::new(),
            })
            .collect(),
        timeouts: RouteTimeouts::default(),
        retry: None,
    }
}

fn routes() -> RouteTable {
    let mut rewritten = route("rewritten", "/v1", &[("web", 1)]);
    rewritten.filters = vec![
        Filter::RequestHeaders(HeaderEdit {
            set: vec![("x-added".into(), "yes".into())],
            ..HeaderEdit::default()
        }),
        Filter::Rewrite(Rewrite {
            host: Some("inside.shop".into()),
            path: Some(PathEdit::ReplacePrefix("/new".into())),
        }),
        Filter::ResponseHeaders(HeaderEdit {
            set: vec![("x-from".into(), "route".into())],
            ..HeaderEdit::default()
        }),
    ];
    let mut moved = route("moved", "/old", &[]);
    moved.filters = vec![Filter::Redirect(Redirect {
        scheme: None,
        host: Some("new.example".into()),
        port: None,
        path: None,
        status: 301,
    })];
    let mut unknown = route("unknown", "/unknown", &[("web", 1)]);
    unknown.backends[0].to = None;
    let routes = [
        rewritten,
        moved,
        route("other", "/other", &[("other", 1), ("web", 0)]),
        route("nothing", "/nothing", &[("web", 0)]),
        route("missing", "/missing", &[("absent", 1)]),
        unknown,
    ];
    RouteTable::new(routes.into_iter().map(Arc::new).collect())
}

#[tokio::test]
async fn requests_follow_their_routes() {
    let app = serve(echo).await;
    let other =
        serve(|_: Request<hyper::body::Incoming>| async { Response::new(full("other")) }).await;
    let caller = Setup::caller().start(&Trust::new());
    let mut view = web(&[(app, None)]);
    view.service.ports[0].routes = routes();
    caller.known.set_service(view);
    let mut elsewhere = web(&[(other, None)]);
    elsewhere.service.key = ServiceKey::new("cluster", "shop", "other");
    elsewhere.service.vips.clear();
    caller.known.set_service(elsewhere);

    let request = Request::get("/v1/./x?q=1")
        .header("host", "web")
        .body(empty())
        .unwrap();
    let response = http1(caller.outbound()).await.send(request).await.unwrap();
    assert_eq!(response.headers()["x-from"], "route");
    assert_eq!(
        read(response).await.1,
        "inside.shop /new/x?q=1 Some(\"yes\")"
    );
    assert_eq!(
        caller.seen.line(0).await.route.as_deref(),
        Some("rewritten")
    );

    let request = Request::get("/old/x")
        .header("host", "web")
        .body(empty())
        .unwrap();
    let response = http1(caller.outbound()).await.send(request).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["location"]),
        (301, &"http://new.example/old/x".parse().unwrap())
    );

    assert_eq!(
        get(caller.outbound(), "/other").await,
        (200, "other".into())
    );
    for (path, status, flags) in [
        ("/none", 404, "NR"),
        ("/nothing", 500, "NR"),
        ("/missing", 500, "NR"),
        ("/unknown", 500, "NR"),
    ] {
        let (got, body) = get(caller.outbound(), path).await;
        assert_eq!(got, status, "{path}: {body}");
        let line = caller
            .seen
            .wait(|recorded| recorded.lines.last().cloned())
            .await;
        assert_eq!(line.flags, flags, "{path}");
    }
}

fn allow(rule: Rule) -> Authorization {
    let policy = Policy {
        name: "shop/readers".into(),
        rules: vec![rule],
    };
    Authorization {
        deny: Vec::new(),
        allow: vec![policy],
    }
}

#[tokio::test]
async fn requests_are_authorised_one_by_one() {
    let pair = Pair::new(serve(echo).await);
    pair.callee.set_own(|own| {
        own.authorization = allow(Rule {
            from: vec![Source {
                principals: vec![TextPattern::Exact("cluster.local/ns/shop/sa/caller".into())],
                ..Source::default()
            }],
            to: vec![Operation {
                methods: vec![TextPattern::Exact("GET".into())],
                paths: vec![TextPattern::Prefix("/public/".into())],
                ..Operation::default()
            }],
        });
    });
    let mut client = http1(pair.caller.outbound()).await;
    for (path, expected) in [
        ("/public/a", 200),
        ("/private", 403),
        ("/public/../private", 403),
        ("/%70ublic/a", 200),
        ("/public/%2e%2e/private", 403),
        ("/public/..;/private", 400),
        ("/public/%2fx", 400),
    ] {
        let (status, body) = client.get(path).await;
        assert_eq!(status, expected, "{path}: {body}");
        if status == 400 {
            client = http1(pair.caller.outbound()).await;
        }
    }
    let seen = client.get("/%70ublic/./a").await.1;
    assert!(
        seen.contains(" /public/a "),
        "forwarded as it was judged: {seen}"
    );
    let request = Request::post("/public/a")
        .header("host", "a")
        .body(empty())
        .unwrap();
    let (status, body) = read(client.send(request).await.unwrap()).await;
    assert_eq!(status, 403);
    assert!(body.contains("denied"), "{body}");
    assert_eq!(
        get(pair.callee.inbound(), "/public/a").await.0,
        403,
        "plaintext is nobody"
    );
    let line = pair
        .callee
        .seen
        .wait(|recorded| recorded.lines.iter().find(|l| l.status == 403).cloned())
        .await;
    assert_eq!(line.flags, "UAEX");
}

#[tokio::test]
async fn opaque_connections_are_authorised_whole_and_closed_when_it_is_withdrawn() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let pair = Pair::new(app);
    let mut stream = tokio::net::TcpStream::connect(pair.caller.outbound())
        .await
        .unwrap();
    let mut buffer = [0; 4];
    for _ in 0..2 {
        stream.write_all(b"\0abc").await.unwrap();
        stream.read_exact(&mut buffer).await.unwrap();
    }
    let namespace = |namespace: &str| Rule {
        from: vec![Source {
            namespaces: vec![TextPattern::Exact(namespace.into())],
            ..Source::default()
        }],
        to: Vec::new(),
    };
    pair.callee
        .set_own(|own| own.authorization = allow(namespace("shop")));
    stream.write_all(b"\0abc").await.unwrap();
    stream.read_exact(&mut buffer).await.unwrap();
    pair.callee
        .set_own(|own| own.authorization = allow(namespace("elsewhere")));
    assert_eq!(crate::apps::to_end(&mut stream).await, "");
    pair.callee.seen.refusal(RefusalReason::Authorization).await;
    assert_eq!(exchange(pair.caller.outbound(), b"\0abc").await, "");
}

fn deny_all() -> Authorization {
    Authorization {
        deny: vec![Policy {
            name: "shop/none".into(),
            rules: vec![Rule::default()],
        }],
        allow: Vec::new(),
    }
}

/// What a client sends on and on is not passed on after the change, also where the server says
/// nothing meanwhile, or has begun to answer and says no more.
#[tokio::test]
async fn a_request_under_way_ends_when_its_authorization_is_withdrawn() {
    for (answers_first, keeps) in [(false, false), (true, false), (false, true), (true, true)] {
        let (seen, mut sees) = tokio::sync::mpsc::unbounded_channel();
        let app = serve(move |request: Request<hyper::body::Incoming>| {
            let seen = seen.clone();
            async move {
                let mut body = request.into_body();
                let read = async move {
                    while let Some(Ok(frame)) = body.frame().await {
                        let _ = seen.send(frame.into_data().unwrap());
                    }
                };
                if !answers_first {
                    read.await;
                    return Response::new(empty());
                }
                tokio::spawn(read);
                let never = futures_util::stream::pending();
                Response::new(http_body_util::StreamBody::new(never).boxed())
            }
        })
        .await;
        let pair = Pair::new(app);
        let stream = tokio::net::TcpStream::connect(pair.callee.inbound())
            .await
            .unwrap();
        let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        // What may be repeated is kept as it is read.
        let method = if keeps { "PUT" } else { "POST" };
        let request = Request::builder().method(method).uri("http://a/");
        let request = request.body(()).unwrap();
        let (mut response, mut body) = client.send_request(request, false).unwrap();
        body.send_data("one".into(), false).unwrap();
        assert_eq!(sees.recv().await.unwrap(), "one");
        let begun = if answers_first {
            let begun = (&mut response).await.unwrap();
            assert_eq!(begun.status(), 200);
            Some(begun.into_body())
        } else {
            None
        };
        pair.callee.set_own(|own| own.authorization = deny_all());
        for _ in 0..20 {
            let _ = body.send_data("two".into(), false);
        }
        match begun {
            Some(mut begun) => assert!(begun.data().await.unwrap().is_err()),
            None => assert_eq!(response.await.unwrap().status(), 403),
        }
        assert!(sees.try_recv().is_err(), "what came after the change");
        let line = pair.callee.seen.line(0).await;
        assert_eq!(line.flags, "UAEX");
    }
}

#[tokio::test]
async fn a_response_under_way_ends_when_its_authorization_is_withdrawn() {
    let (send, receive) = tokio::sync::mpsc::channel::<&'static str>(1);
    let receive = Arc::new(tokio::sync::Mutex::new(receive));
    let app = serve(move |_: Request<hyper::body::Incoming>| {
        let receive = receive.clone();
        async move {
            let frames = futures_util::stream::unfold(receive, |receive| async move {
                let word = receive.lock().await.recv().await?;
                Some((Ok(hyper::body::Frame::data(word.into())), receive))
            });
            Response::new(http_body_util::StreamBody::new(frames).boxed())
        }
    })
    .await;
    let pair = Pair::new(app);
    let request = Request::get("/").header("host", "a").body(empty()).unwrap();
    let mut body = http1(pair.caller.outbound())
        .await
        .send(request)
        .await
        .unwrap()
        .into_body();
    send.send("one").await.unwrap();
    assert_eq!(
        body.frame().await.unwrap().unwrap().into_data().unwrap(),
        "one"
    );
    pair.callee.set_own(|own| own.authorization = deny_all());
    send.send("two").await.unwrap();
    assert!(
        body.frame().await.unwrap().is_err(),
        "what came after the change is not passed on"
    );
}

/// Counts the requests that a Service sees, and sums up their bodies' lengths.
async fn counting() -> (std::net::SocketAddr, Arc<std::sync::Mutex<Vec<usize>>>) {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let counted = seen.clone();
    let address = serve(move |request: Request<hyper::body::Incoming>| {
        let counted = counted.clone();
        async move {
            let body = BodyExt::collect(request.into_body()).await;
            counted.lock().unwrap().push(body.unwrap().to_bytes().len());
            Response::builder()
                .status(500)
                .body(full("not for you"))
                .unwrap()
        }
    })
    .await;
    (address, seen)
}

#[tokio::test]
async fn a_mirror_sees_requests_and_is_not_heard() {
    let (shadow, seen) = counting().await;
    let pair = Pair::with(serve(echo).await, |view| {
        let mut mirrored = route("mirrored", "/", &[("web", 1)]);
        let mirror = |per_million| Filter::Mirror {
            service: ServiceKey::new("cluster", "shop", "shadow"),
            port: 80,
            per_million,
        };
        mirrored.filters = vec![mirror(1_000_000), mirror(0)];
        let mut absent = route("absent", "/absent", &[("web", 1)]);
        absent.filters = vec![Filter::Mirror {
            service: ServiceKey::new("cluster", "shop", "nobody"),
            port: 80,
            per_million: 1_000_000,
        }];
        let routes = [mirrored, absent].map(Arc::new).to_vec();
        view.service.ports[0].routes = RouteTable::new(routes);
    });
    let mut view = web(&[(shadow, None)]);
    view.service.key = ServiceKey::new("cluster", "shop", "shadow");
    view.service.vips.clear();
    pair.caller.known.set_service(view);
    let mut client = http1(pair.caller.outbound()).await;
    for body in ["", "hello"] {
        let request = Request::post("/x")
            .header("host", "a")
            .body(full(body))
            .unwrap();
        assert_eq!(read(client.send(request).await.unwrap()).await.0, 200);
        pair.caller.seen.note_of("shadow mirrored answered").await;
        pair.caller.seen.forget_notes();
    }
    assert_eq!(*seen.lock().unwrap(), [0, 5]);
    let large = "x".repeat(70 * 1024);
    let request = Request::post("/x")
        .header("host", "a")
        .body(full(large))
        .unwrap();
    let answer = read(client.send(request).await.unwrap()).await;
    assert_eq!(answer.0, 200, "{answer:?}");
    pair.caller.seen.note_of("shadow mirrored dropped").await;
    assert_eq!(client.get("/absent").await.0, 200);
    pair.caller.seen.note_of("nobody mirrored failed").await;
    assert_eq!(seen.lock().unwrap().len(), 2);
}
