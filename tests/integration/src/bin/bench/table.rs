//! Tables for a person: columns as wide as they need to be.

/// Prints a table; the first row is its head. The first column is text, the others are figures.
pub fn print(title: &str, rows: &[Vec<String>]) {
    println!("\n{title}");
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(column, cell)| match column {
                0 => format!("{cell:<0$}", widths[column]),
                _ => format!("{cell:>0$}", widths[column]),
            })
            .collect();
        println!("  {}", cells.join("   ").trim_end());
        if number == 0 {
            println!("  {}", widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>().join("   "));
        }
    }
}

/// `figure (xRATIO of ours)`.
pub fn ratio(figure: f64, ours: f64) -> String {
    format!("{figure:.2} (x{:.1})", figure / ours)
}

/// A goal and whether it was reached.
pub fn goal(figure: f64, goal: f64, unit: &str) -> String {
    let verdict = if figure <= goal { "reached" } else { "missed" };
    format!("<= {goal} {unit}: {verdict}")
}
