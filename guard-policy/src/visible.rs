//! Owns how text that others wrote is shown: nothing in it steers a terminal, breaks a line, or reads in another order than it is written.
//! Called by `diagnostic`, and by everything in the daemon that writes tables, lines, JSON and log fields.
//! Must never change text that is only letters, digits, punctuation and spaces.

use std::borrow::Cow;

/// Whether a character acts instead of being seen: a control character, or one that is invisible or changes the order of reading (the bidi
/// controls of Unicode TR 9, zero-width characters, line separators, tags).
pub fn acts(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

/// The text in one line, with each character that acts written as its escape, as in `\n` or `\u{1b}`.
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.chars().any(acts) {
        return Cow::Borrowed(text);
    }
    let shown = |shown: String, character: char| match character {
        '\n' | '\r' | '\t' => shown + &character.escape_default().to_string(),
        acting if acts(acting) => shown + &acting.escape_unicode().to_string(),
        other => shown + other.encode_utf8(&mut [0; 4]),
    };
    text.chars().fold(String::with_capacity(text.len()), shown).into()
}

/// The text of several lines, each as [`visible`] shows it.
pub fn visible_lines(text: &str) -> String {
    text.split('\n').map(visible).collect::<Vec<_>>().join("\n")
}

/// The text with every byte where it was: a character that acts becomes one of the same length. Line ends, tabs and ASCII stay.
pub(crate) fn in_place(text: &str) -> String {
    let shown = |character: char| match character.len_utf8() {
        2 if acts(character) => '\u{bf}',
        3 if acts(character) => char::REPLACEMENT_CHARACTER,
        4 if acts(character) => '\u{1f6ab}',
        _ => character,
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any text, with many characters that act.
    fn hostile() -> impl Strategy<Value = String> {
        let character = prop_oneof![
            any::<char>(),
            prop::char::range('\0', '\u{9f}'),
            prop::char::range('\u{200b}', '\u{206f}'),
            prop::char::range('\u{e0000}', '\u{e007f}'),
        ];
        prop::collection::vec(character, 0..40).prop_map(String::from_iter)
    }

    #[test]
    fn what_acts_is_shown_as_its_escape() {
        let screen = "\u{1b}[2J\u{9b}H\r\n\tb\u{202e}a\u{7f}";
        assert_eq!(visible(screen), "\\u{1b}[2J\\u{9b}H\\r\\n\\tb\\u{202e}a\\u{7f}");
        assert_eq!(visible_lines("a\u{7}\nb\n"), "a\\u{7}\nb\n");
        for text in ["", "node-1:10250", "größe, 日本 \\n {}", "\u{fffd}"] {
            assert!(matches!(visible(text), Cow::Borrowed(shown) if shown == text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_shown_acts(text in hostile()) {
            prop_assert!(!visible(&text).chars().any(acts));
            prop_assert!(!visible_lines(&text).chars().any(|character| acts(character) && character != '\n'));
            let lines = |text: &str| text.matches('\n').count();
            prop_assert_eq!(lines(&visible_lines(&text)), lines(&text));
        }

        #[test]
        fn in_place_keeps_every_position(text in hostile()) {
            let shown = in_place(&text);
            prop_assert_eq!(shown.len(), text.len());
            prop_assert!(text.char_indices().zip(shown.char_indices()).all(|((before, _), (after, _))| before == after));
            prop_assert!(!shown.chars().any(|character| acts(character) && !character.is_ascii()));
        }
    }
}
