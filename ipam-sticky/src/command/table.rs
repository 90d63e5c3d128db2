//! Rows for people: columns as wide as they need to be.

/// A table with a heading; empty cells show as `-`.
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let cell = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let lines: Vec<[String; N]> = std::iter::once(heading.map(String::from))
        .chain(rows.iter().map(|row| row.each_ref().map(|text| cell(text))))
        .collect();
    let mut widths = [0; N];
    for line in &lines {
        for (width, text) in widths.iter_mut().zip(line) {
            *width = (*width).max(text.chars().count());
        }
    }
    let mut out = String::new();
    for line in &lines {
        let padded: Vec<String> =
            line.iter().zip(widths).map(|(text, width)| format!("{text:width$}")).collect();
        out.push_str(padded.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// A JSON document with a line end.
pub fn json(document: &serde_json::Value) -> String {
    format!("{document:#}\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns() {
        let rows = [["a".to_owned(), String::new()], ["longer".to_owned(), "x".to_owned()]];
        assert_eq!(super::table(["ONE", "TWO"], &rows), "ONE     TWO\na       -\nlonger  x\n");
    }
}
