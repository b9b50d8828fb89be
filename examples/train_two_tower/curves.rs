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

/// A curve: the objective's name and its value after each epoch.
type Curve<'a> = (&'a str, Vec<f64>);

pub fn draw(path: &Path, runs: &[Finished<'_>]) -> Fallible<()> {
    draw_panels(path, runs).map_err(|e| format!("{}: {e}", path.display()).into())
}

fn draw_panels(path: &Path, runs: &[Finished<'_>]) -> Result<(), Box<dyn Error>> {
    let picture = SVGBackend::new(path, (1200, 480)).into_drawing_area();
    picture.fill(&WHITE)?;
    let panels = picture.split_evenly((1, 2));
    draw_panel(&panels[0], "training loss (each objective has its own scale)", &curves(runs, |p| p.train_loss))?;
    draw_panel(&panels[1], "validation NDCG@10", &curves(runs, |p| p.validation_ndcg_at_10))?;
    picture.present()?;
    Ok(())
}

/// One curve per objective that was trained: the mean over its seeds.
fn curves<'a>(runs: &[Finished<'a>], value: fn(&EpochPoint) -> f64) -> Vec<Curve<'a>> {
    let mean_curve = |of_seeds: &[Finished<'a>]| {
        let mean = |epoch| of_seeds.iter().map(|run| value(&run.curve[epoch])).sum::<f64>() / of_seeds.len() as f64;
        (of_seeds[0].objective.name.as_str(), (0..of_seeds[0].curve.len()).map(mean).collect())
    };
    by_objective(runs).map(mean_curve).collect()
}

fn draw_panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    curves: &[Curve<'_>],
) -> Result<(), Box<dyn Error>> {
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
        .draw()?;
    for (index, (name, values)) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()].stroke_width(2);
        let points = values.iter().enumerate().map(|(epoch, &value)| ((epoch + 1) as f64, value));
        chart
            .draw_series(LineSeries::new(points, colour).point_size(3))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    Ok(())
}
