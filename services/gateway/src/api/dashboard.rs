//! `GET /dashboard`: the cluster as a page. Its files are part of the program and need nothing from anywhere else,
//! which their policy tells the browser to hold them to. They know no more than what `/status` and the API say.

use super::unknown_url;
use axum::Router;
use axum::http::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, LOCATION,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::hash::{DefaultHasher, Hash, Hasher};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Path, kind, bytes.
type File = (&'static str, &'static str, &'static str);

const FILES: [File; 14] = [
    ("/dashboard", HTML, include_str!("../dashboard/index.html")),
    ("/dashboard/style.css", CSS, include_str!("../dashboard/style.css")),
    ("/dashboard/icon.svg", SVG, include_str!("../dashboard/icon.svg")),
    ("/dashboard/theme.js", JS, include_str!("../dashboard/theme.js")),
    ("/dashboard/main.js", JS, include_str!("../dashboard/main.js")),
    ("/dashboard/dom.js", JS, include_str!("../dashboard/dom.js")),
    ("/dashboard/units.js", JS, include_str!("../dashboard/units.js")),
    ("/dashboard/api.js", JS, include_str!("../dashboard/api.js")),
    ("/dashboard/flow.js", JS, include_str!("../dashboard/flow.js")),
    ("/dashboard/members.js", JS, include_str!("../dashboard/members.js")),
    ("/dashboard/orders.js", JS, include_str!("../dashboard/orders.js")),
    ("/dashboard/charts.js", JS, include_str!("../dashboard/charts.js")),
    ("/dashboard/chat.js", JS, include_str!("../dashboard/chat.js")),
    ("/dashboard/waterfall.js", JS, include_str!("../dashboard/waterfall.js")),
];

/// Nothing inline, nothing from outside, in no frame.
const POLICY: &str =
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'";

const HEADERS: [(HeaderName, &str); 4] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-cache"),
];

pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let root = Router::new().route("/", get(root));
    FILES.into_iter().fold(root, |routes, file| {
        let tag = tag(file.2);
        routes.route(file.0, get(move |headers: HeaderMap| async move { serve(file, &tag, &headers) }))
    })
}

/// A browser wants to see something; a program has come to the wrong address.
async fn root(method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    match accept.contains("text/html") {
        true => (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, "dashboard")]).into_response(),
        false => unknown_url(method, uri).await,
    }
}

fn serve((_, kind, text): File, tag: &str, headers: &HeaderMap) -> Response {
    let known = headers.get(IF_NONE_MATCH).and_then(|known| known.to_str().ok()).unwrap_or_default();
    let tagged = [(ETAG, tag)];
    match known.contains(tag) {
        true => (StatusCode::NOT_MODIFIED, HEADERS, tagged).into_response(),
        false => (HEADERS, tagged, [(CONTENT_TYPE, kind)], text).into_response(),
    }
}

fn tag(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_comes_from_outside_and_nothing_is_inline() {
        for (path, kind, text) in FILES {
            let foreign = text.replace("http://www.w3.org/2000/svg", "");
            assert!(
                !foreign.contains("http://") && !foreign.contains("https://"),
                "{path} names another host"
            );
            if kind == HTML {
                for inline in ["<style", "style=\"", "onclick=", "<script>"] {
                    assert!(!text.contains(inline), "{path} has {inline}, which its policy forbids");
                }
            }
        }
    }

    #[test]
    fn what_is_known_is_not_sent_again() {
        let tag = tag(FILES[0].2);
        let mut headers = HeaderMap::new();
        assert_eq!(serve(FILES[0], &tag, &headers).status(), StatusCode::OK);
        headers.insert(IF_NONE_MATCH, tag.parse().unwrap());
        assert_eq!(serve(FILES[0], &tag, &headers).status(), StatusCode::NOT_MODIFIED);
    }
}
