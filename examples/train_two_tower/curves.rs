//! The picture of the curves: training loss and validation NDCG@10 by epoch, averaged over seeds.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use crate::Fallible;
use crate::report::{Finished, by_objective};
use crate::train::EpochPoint;

/// One colour per objective, told apart by the colour-blind too (Okabe and Ito).
const COLOURS: [RGBColor; 5] =
    [RGBColor(213, 94, 0), RGBColor(0, 114, 178), RGBColor(0, 158, 115), RGBColor(204, 121, 167), RGBColor(0, 0, 0)];

/// Names of objectives may be long.
const LEGEND_COLUMNS: usize = 2;
const LEGEND_LINE: u32 = 22;

/// A curve: the objective's name and its value after each epoch.
type Curve<'a> = (&'a str, Vec<f64>);
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

pub fn draw(path: &Path, runs: &[Finished<'_>]) -> Fallible<()> {
    draw_panels(path, runs).map_err(|e| format!("{}: {e}", path.display()).into())
}

fn draw_panels(path: &Path, runs: &[Finished<'_>]) -> Result<(), Box<dyn Error>> {
    // Of each run that is there, relative to its first epoch: losses have scales of their own.
    let losses = curves(runs, |run| {
        let first = run.curve.first().map_or(1.0, |point| point.train_loss);
        run.curve.iter().map(|point| if first == 0.0 { 0.0 } else { point.train_loss / first }).collect()
    });
    let validation = |point: &EpochPoint| point.validation.map(|validation| validation.ndcg_at_10);
    let ndcg = curves(runs, |run| run.curve.iter().filter_map(validation).collect());
    let legend_height = LEGEND_LINE * losses.len().div_ceil(LEGEND_COLUMNS) as u32 + 12;
    let picture = SVGBackend::new(path, (1200, 480 + legend_height)).into_drawing_area();
    picture.fill(&WHITE)?;
    let (panels, legend) = picture.split_vertically(480);
    let panels = panels.split_evenly((1, 2));
    draw_panel(&panels[0], "training loss, relative to that of the first epoch", &losses)?;
    draw_panel(&panels[1], "validation NDCG@10", &ndcg)?;
    draw_legend(&legend, &losses)?;
    picture.present()?;
    Ok(())
}

/// One curve per objective that was trained: the mean over its seeds.
fn curves<'a>(runs: &[Finished<'a>], values: impl Fn(&Finished<'a>) -> Vec<f64>) -> Vec<Curve<'a>> {
    let mean_curve = |of_seeds: &[Finished<'a>]| {
        let all: Vec<Vec<f64>> = of_seeds.iter().map(&values).collect();
        let mean = |epoch: usize| all.iter().map(|values| values[epoch]).sum::<f64>() / all.len() as f64;
        (of_seeds[0].objective.name.as_str(), (0..all[0].len()).map(mean).collect())
    };
    by_objective(runs).map(mean_curve).collect()
}

fn draw_panel(area: &Area<'_>, title: &str, curves: &[Curve<'_>]) -> Result<(), Box<dyn Error>> {
    let epochs = curves.iter().map(|(_, values)| values.len()).max().unwrap_or(0);
    let top = curves.iter().flat_map(|(_, values)| values).fold(0.0, |max, &value| f64::max(max, value));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(1.0..f64::max(epochs as f64, 2.0), 0.0..1.05 * f64::max(top, 1e-3))?;
    chart
        .configure_mesh()
        .x_desc("epoch")
        .x_labels(epochs.clamp(2, 10))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (index, (_, values)) in curves.iter().enumerate() {
        let points = values.iter().enumerate().map(|(epoch, &value)| ((epoch + 1) as f64, value));
        chart.draw_series(LineSeries::new(points, stroke(index)).point_size(3))?;
    }
    Ok(())
}

/// The names below the panels, where they hide no curve.
fn draw_legend(area: &Area<'_>, curves: &[Curve<'_>]) -> Result<(), Box<dyn Error>> {
    for (index, (name, _)) in curves.iter().enumerate() {
        let x = 56 + (index % LEGEND_COLUMNS) as i32 * 560;
        let y = 12 + (index / LEGEND_COLUMNS) as i32 * LEGEND_LINE as i32;
        area.draw(&PathElement::new([(x, y), (x + 24, y)], stroke(index)))?;
        area.draw(&Text::new(*name, (x + 32, y - 8), ("sans-serif", 14)))?;
    }
    Ok(())
}

fn stroke(index: usize) -> ShapeStyle {
    COLOURS[index % COLOURS.len()].stroke_width(2)
}
