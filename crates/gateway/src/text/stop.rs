//! Finds stop strings in text that arrives in pieces. Never lets out text that might still become a stop string.

/// Watches a stream of text for the first of several stop strings.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// Text not let out yet: a proper prefix of some stop string, or empty.
    held: String,
}

/// What became of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum StopOutcome {
    /// No stop string so far; this text is safe to show.
    Continue(String),
    /// A stop string is complete; this is the text before it.
    Stopped(String),
}

impl StopMatcher {
    /// Empty stop strings must have been refused before.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        StopMatcher { stops, held: String::new() }
    }

    /// Takes the next piece of text. After [`StopOutcome::Stopped`] nothing more may be pushed.
    pub(crate) fn push(&mut self, text: &str) -> StopOutcome {
        if self.stops.is_empty() {
            return StopOutcome::Continue(text.to_owned());
        }
        if text.is_empty() {
            return StopOutcome::Continue(String::new());
        }
        self.held.push_str(text);
        // The match that begins first wins, whatever the order in the request.
        if let Some(start) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(start);
            return StopOutcome::Stopped(std::mem::take(&mut self.held));
        }
        let keep = self.possible_start();
        let rest = self.held.split_off(keep);
        StopOutcome::Continue(std::mem::replace(&mut self.held, rest))
    }

    /// The text still held, when the sequence ended by other means.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Byte offset of the longest suffix of `held` that is the beginning of a stop string.
    fn possible_start(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|&start| self.held.is_char_boundary(start))
            .find(|&start| {
                self.stops.iter().any(|stop| stop.as_bytes().starts_with(&self.held.as_bytes()[start..]))
            })
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown = String::new();
        for piece in pieces {
            match matcher.push(piece) {
                StopOutcome::Continue(text) => shown.push_str(&text),
                StopOutcome::Stopped(text) => {
                    shown.push_str(&text);
                    return (shown, true);
                }
            }
        }
        shown.push_str(&matcher.finish());
        (shown, false)
    }

    #[test]
    fn matches_across_pieces() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), ("a ".into(), true));
        assert_eq!(run(&["END"], &["a E", "N", "E"]), ("a ENE".into(), false));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&["\n\n", "é!"], &["x\n", "y é", "!"]), ("x\ny ".into(), true));
    }

    #[test]
    fn the_earliest_match_wins() {
        assert_eq!(run(&["c", "bc"], &["abcd"]), ("a".into(), true));
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop() {
        let mut matcher = StopMatcher::new(vec!["###".into()]);
        assert_eq!(matcher.push("text #"), StopOutcome::Continue("text ".into()));
        assert_eq!(matcher.push("#"), StopOutcome::Continue(String::new()));
        assert_eq!(matcher.push("x"), StopOutcome::Continue("##x".into()));
        assert_eq!(matcher.finish(), "");
    }

    proptest! {
        /// However the text is cut, the result is that of a search in the whole text.
        #[test]
        fn cutting_does_not_matter(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
            cuts in prop::collection::vec(0usize..40, 0..10),
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(chars.len())).collect();
            cuts.push(chars.len());
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut from = 0;
            for cut in cuts {
                pieces.push(chars[from..cut].iter().collect::<String>());
                from = cut;
            }
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (shown, stopped) = run(&stops, &pieces);
            // A longer stop that starts earlier may complete after a shorter one, so only the end of the first
            // completed match is certain: compare with a search in the text up to there.
            let end = stops.iter().filter_map(|stop| text.find(stop).map(|at| at + stop.len())).min();
            prop_assert_eq!(stopped, end.is_some());
            match end {
                None => prop_assert_eq!(shown, text),
                Some(_) => {
                    prop_assert!(text.starts_with(&shown));
                    prop_assert!(stops.iter().any(|stop| text[shown.len()..].starts_with(stop)));
                    prop_assert!(stops.iter().all(|stop| !shown.contains(stop)));
                }
            }
        }
    }
}
