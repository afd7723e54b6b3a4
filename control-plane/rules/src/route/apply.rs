//! What a route's filters do to a request, by the letter of Gateway API.

use std::{borrow::Cow, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{HeaderEdit, PathEdit, PathMatch, Redirect};

impl PathEdit {
    /// The new path. `matched` is the route's path match, whose prefix is what gets replaced; both
    /// sides count without their trailing slash, so `/foo` → `/xyz/` makes `/xyz/bar` of
    /// `/foo/bar` and `/xyz/` of `/foo`.
    pub fn apply<'a>(&'a self, matched: &PathMatch, path: &str) -> Cow<'a, str> {
        match self {
            Self::ReplaceFull(full) => Cow::Borrowed(full),
            Self::ReplacePrefix(new) => {
                let rest = match matched {
                    PathMatch::Exact(_) => "",
                    PathMatch::Prefix(prefix) => path
                        .strip_prefix(prefix.trim_end_matches('/'))
                        .unwrap_or_default(),
                };
                if rest.is_empty() {
                    return if new.is_empty() {
                        Cow::Borrowed("/")
                    } else {
                        Cow::Borrowed(new)
                    };
                }
                Cow::Owned(format!("{}{rest}", new.trim_end_matches('/')))
            }
        }
    }
}

/// What a redirect keeps of the request.
#[derive(Clone, Copy, Debug)]
pub struct RedirectFrom<'a> {
    /// `http` or `https`.
    pub scheme: &'a str,
    /// As in the request, without port; an IPv6 address in brackets.
    pub host: &'a str,
    /// The port of the Service that was called.
    pub port: u16,
    pub path: &'a str,
    pub query: Option<&'a str>,
}

impl Redirect {
    /// The `location` of the answer. A scheme without a port means the scheme's own port; the
    /// default port is not written.
    pub fn location(&self, matched: &PathMatch, from: &RedirectFrom<'_>) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(from.scheme);
        let host = self.host.as_deref().unwrap_or(from.host);
        let default = if scheme == "https" { 443 } else { 80 };
        let port = match (self.port, &self.scheme) {
            (Some(port), _) => port,
            (None, Some(_)) => default,
            (None, None) => from.port,
        };
        let path = match &self.path {
            Some(edit) => edit.apply(matched, from.path),
            None => Cow::Borrowed(from.path),
        };
        let port = if port == default {
            String::new()
        } else {
            format!(":{port}")
        };
        let query = from
            .query
            .map_or_else(String::new, |query| format!("?{query}"));
        format!("{scheme}://{host}{port}{path}{query}")
    }
}

impl HeaderEdit {
    /// Names and values were validated when the resource was; one that is still no header is
    /// left out rather than forwarded.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in self.set.iter().filter_map(parse) {
            headers.insert(name, value);
        }
        for (name, value) in self.add.iter().filter_map(parse) {
            headers.append(name, value);
        }
        for name in &self.remove {
            headers.remove(&**name);
        }
    }
}

fn parse((name, value): &(Arc<str>, Arc<str>)) -> Option<(HeaderName, HeaderValue)> {
    Some((
        HeaderName::from_bytes(name.as_bytes()).ok()?,
        HeaderValue::from_str(value).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of `HTTPPathModifier.replacePrefixMatch` in the Gateway API reference.
    #[test]
    fn prefixes_are_replaced_as_specified() {
        for (path, prefix, new, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo/bar", "/foo", "/", "/bar"),
            ("/foo/bar", "/", "/xyz", "/xyz/foo/bar"),
            ("/", "/", "/xyz", "/xyz/"),
        ] {
            let edit = PathEdit::ReplacePrefix(new.into());
            assert_eq!(
                edit.apply(&PathMatch::prefix(prefix), path),
                expected,
                "{path} {prefix}"
            );
        }
        let full = PathEdit::ReplaceFull("/all".into());
        assert_eq!(full.apply(&PathMatch::default(), "/x"), "/all");
    }

    #[test]
    fn redirects_keep_what_they_do_not_change() {
        let from = RedirectFrom {
            scheme: "http",
            host: "web.shop",
            port: 8080,
            path: "/a/b",
            query: Some("q=1"),
        };
        let keep = Redirect {
            scheme: None,
            host: None,
            port: None,
            path: None,
            status: 302,
        };
        let at = |redirect: &Redirect| redirect.location(&PathMatch::prefix("/a"), &from);
        assert_eq!(at(&keep), "http://web.shop:8080/a/b?q=1");
        let https = Redirect {
            scheme: Some("https".into()),
            ..keep.clone()
        };
        assert_eq!(at(&https), "https://web.shop/a/b?q=1");
        let all = Redirect {
            scheme: Some("https".into()),
            host: Some("example.com".into()),
            port: Some(8443),
            path: Some(PathEdit::ReplacePrefix("/z".into())),
            status: 301,
        };
        assert_eq!(at(&all), "https://example.com:8443/z/b?q=1");
        let plain = Redirect {
            port: Some(80),
            ..keep
        };
        assert_eq!(at(&plain), "http://web.shop/a/b?q=1");
    }

    #[test]
    fn headers_are_set_added_and_removed() {
        let mut headers = HeaderMap::new();
        headers.insert("a", HeaderValue::from_static("old"));
        headers.insert("c", HeaderValue::from_static("gone"));
        let edit = HeaderEdit {
            set: vec![("a".into(), "new".into()), ("bad name".into(), "x".into())],
            add: vec![("a".into(), "more".into())],
            remove: vec!["c".into()],
        };
        edit.apply(&mut headers);
        let all: Vec<_> = headers.get_all("a").iter().collect();
        assert_eq!(all, ["new", "more"]);
        assert_eq!(headers.len(), 2);
    }
}
