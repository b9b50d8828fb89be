//! How far the mean gradient of sampled negatives is from the full softmax's: each correction, and pools in one loss with
//! one Q for their union or with a Q for each pool.
//!
//! ```text
//! cargo run --release --example gradient_bias -- --steps 10000 --svg docs/gradient_bias.svg
//! ```
//!
//! One row, whose positive has probability 0.57 under the full softmax over 2000 items of Zipf's popularity; scores do not
//! depend on popularity. Negatives are drawn anew in each step: B − 1 by popularity (in-batch), B uniform ones, 4 B by
//! popularity in a queue. Embeddings stay as they are, so that a queue's staleness is no part of this.
//!
//! The table has, relative to the length of the full softmax's gradient: the distance of the mean gradient from it (bias,
//! and what the standard error leaves of the noise), the standard error of the mean, and the standard deviation of one
//! step's gradient. All of that is the query's gradient; a second table has how much of theirs the items get, of which a queue's
//! rows, without gradient, pass none on. Draws are those of `testing/src/gradient_bias.rs`, which `tests/gradient_bias.rs` holds
//! to closed forms.

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Parser;
use plotters::coord::Shift;
use plotters::prelude::*;

use catalog_softmax_testing::gradient_bias::{Catalogue, HEAD, Measured, Setup, setups};

/// Measures the bias of sampled negatives.
#[derive(Parser)]
struct Args {
    /// Steps that each mean is over
    #[arg(long, default_value_t = 2000)]
    steps: usize,
    /// Where to draw the picture
    #[arg(long, default_value = "target/gradient_bias.svg")]
    svg: PathBuf,
}

/// Rows of the batch, B.
const BATCHES: [usize; 6] = [32, 64, 128, 256, 512, 1024];

/// One way to take negatives, for each size of the batch.
struct Curve {
    setup: Setup,
    points: Vec<(usize, Measured)>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if args.steps < 2 {
        return Err("--steps is below 2: there is no standard error then".into());
    }
    let catalogue = Catalogue::new();
    let curve = |(at, setup): (usize, Setup)| {
        let measure = |&b: &usize| (b, setups(b)[at].measure(&catalogue, args.steps, b as u64));
        Curve { points: BATCHES.iter().map(measure).collect(), setup }
    };
    let curves: Vec<Curve> = setups(BATCHES[0]).into_iter().enumerate().map(curve).collect();
    print_table(&curves);
    print_items(&catalogue, args.steps);
    draw(&args.svg, &curves).map_err(|e| format!("{}: {e}", args.svg.display()))?;
    println!("\npicture: {}", args.svg.display());
    Ok(())
}

fn print_table(curves: &[Curve]) {
    let sizes = [32, 256, 1024];
    let header: Vec<String> = sizes.iter().map(|b| format!("B = {b}")).collect();
    println!("| negatives | {} | noise of a step, B = 256 |", header.join(" | "));
    println!("|---|{}---|", "---|".repeat(sizes.len()));
    for Curve { setup, points } in curves {
        let of = |size: usize| points.iter().find(|(b, _)| *b == size).map(|(_, measured)| measured);
        let cell = |measured: &Measured| format!("{:.4} ± {:.4}", measured.error, measured.standard_error);
        let cells: Vec<String> = sizes.iter().filter_map(|&b| of(b).map(cell)).collect();
        let noise = of(256).map_or(f64::NAN, |measured| measured.noise);
        println!("| {} | {} | {noise:.3} |", setup.name, cells.join(" | "));
    }
}

/// How much of the full softmax's gradient the negative items get.
fn print_items(catalogue: &Catalogue, steps: usize) {
    println!(
        "\n| gradient of the negative items, B = 256 | the {HEAD} most popular ones | the others |\n|---|---|---|"
    );
    let names = ["in-batch + uniform, one Q", "+ queue, one Q"];
    for setup in setups(256).into_iter().filter(|setup| names.contains(&setup.name)) {
        for weighted in if setup.is_queued() { &[false, true][..] } else { &[false] } {
            let [head, tail] = setup.gradient_of_items(catalogue, steps, 256, *weighted);
            let weights = if *weighted { ", weighted" } else { "" };
            println!("| {}{weights} | {head:.3} | {tail:.3} |", setup.name);
        }
    }
}

/// Told apart by the colour-blind too (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
];

fn draw(path: &Path, curves: &[Curve]) -> Result<(), Box<dyn Error>> {
    let picture = SVGBackend::new(path, (1200, 480)).into_drawing_area();
    picture.fill(&WHITE)?;
    let panels = picture.split_evenly((1, 2));
    let (together, alone): (Vec<&Curve>, Vec<&Curve>) = curves.iter().partition(|curve| curve.setup.pools.len() > 1);
    draw_panel(&panels[0], "one pool of negatives", &alone)?;
    draw_panel(&panels[1], "several pools in one loss", &together)?;
    picture.present()?;
    Ok(())
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, curves: &[&Curve]) -> Result<(), Box<dyn Error>> {
    // Above 1 there is room for the legend.
    const LEAST: f64 = 1e-4;
    const MOST: f64 = 1e3;
    let x = |b: usize| (b as f64).log2();
    let mut chart = ChartBuilder::on(area)
        .caption(format!("distance of the mean gradient: {title}"), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(4.8..10.2, (LEAST..MOST).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("B, rows of the batch")
        .y_desc("relative to the full softmax's")
        .x_labels(BATCHES.len())
        .x_label_formatter(&|log_b: &f64| format!("{:.0}", log_b.exp2()))
        .max_light_lines(1)
        .y_label_formatter(&|error| format!("{error:.0e}"))
        .draw()?;
    for (index, curve) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()].stroke_width(2);
        let points = curve.points.iter().map(|(b, measured)| (x(*b), measured.error.max(LEAST)));
        chart
            .draw_series(LineSeries::new(points, colour).point_size(3))?
            .label(curve.setup.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        // Two standard errors to each side.
        let whisker = |(b, measured): &(usize, Measured)| {
            let (at, reach) = (measured.error, 2.0 * measured.standard_error);
            let (low, high) = ((at - reach).max(LEAST), (at + reach).max(LEAST));
            PathElement::new([(x(*b), low), (x(*b), high)], COLOURS[index % COLOURS.len()])
        };
        chart.draw_series(curve.points.iter().map(whisker))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    Ok(())
}
