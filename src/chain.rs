//! An error with its causes, as one line.

use std::error::Error;

/// The error's own text and that of each cause behind it.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_follow_in_order() {
        let inner = std::io::Error::other("inner");
        assert_eq!(chain(&Outer(inner)), "outer: inner");
    }
}
