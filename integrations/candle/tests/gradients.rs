//! What has a gradient, and what becomes of it in candle's graph.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use catalog_softmax_candle::{Options, Reduction, check_device, softmax_loss};
use common::{numbers, random};

const DEVICE: &Device = &Device::Cpu;

fn tensor(seed: u64, rows: usize) -> Result<Tensor> {
    Tensor::from_vec(numbers(&mut random(seed), rows * 8, -1.0, 1.0), (rows, 8), DEVICE)
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

/// Gradients by the loss itself: a derivative in one direction against differences of the loss.
#[test]
fn finite_differences() -> Result<()> {
    let (queries, candidates) = (Var::from_tensor(&tensor(1, 6)?)?, Var::from_tensor(&tensor(2, 6)?)?);
    let log_temperature = Var::new(0.3f64.ln(), DEVICE)?;
    let loss = |q: &Tensor, c: &Tensor, log: &Tensor| {
        let options = Options { temperature: log.exp()?.into(), reduction: Reduction::Sum, ..Options::default() };
        softmax_loss(q, c, &options).map_err(candle_core::Error::from)
    };
    let gradients = loss(&queries, &candidates, &log_temperature)?.backward()?;
    let of = |var: &Var| gradients.get(var).expect("a gradient").clone();
    let towards = [tensor(3, 6)?, tensor(4, 6)?];
    let step = 1e-2;
    let value = |a: f64, b: f64, t: f64| -> Result<f64> {
        let moved = |var: &Var, by: f64, towards: &Tensor| var.as_tensor() + (towards * by)?;
        let (q, c) = (moved(&queries, a, &towards[0])?, moved(&candidates, b, &towards[1])?);
        Ok(f64::from(loss(&q, &c, &(log_temperature.as_tensor() + t)?)?.to_scalar::<f32>()?))
    };
    let along = |d: Tensor, towards: &Tensor| (d * towards)?.sum_all()?.to_scalar::<f32>().map(f64::from);
    let cases = [
        (value(step, 0.0, 0.0)? - value(-step, 0.0, 0.0)?, along(of(&queries), &towards[0])?),
        (value(0.0, step, 0.0)? - value(0.0, -step, 0.0)?, along(of(&candidates), &towards[1])?),
        (value(0.0, 0.0, step)? - value(0.0, 0.0, -step)?, of(&log_temperature).to_scalar::<f64>()?),
    ];
    for (difference, expected) in cases {
        // The difference is off by the third derivative times step², and by the loss's rounding to f32 over step.
        let found = difference / (2.0 * step);
        assert!((found - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{found} {expected}");
    }
    Ok(())
}

#[test]
fn constants_have_no_gradient_and_change_none() -> Result<()> {
    let (queries, candidates) = (Var::from_tensor(&tensor(1, 5)?)?, Var::from_tensor(&tensor(2, 5)?)?);
    let temperature = Var::new(0.1f32, DEVICE)?;
    let step = |q: &Tensor, c: &Tensor, t: &Tensor| {
        let options = Options { temperature: t.into(), ..Options::default() };
        softmax_loss(q, c, &options)?.backward()
    };
    let all = step(&queries, &candidates, &temperature)?;
    for frozen in 0..3 {
        let choose = |index: usize, var: &Var| if index == frozen { var.detach() } else { var.as_tensor().clone() };
        let found = step(&choose(0, &queries), &choose(1, &candidates), &choose(2, &temperature))?;
        for (index, var) in [&queries, &candidates, &temperature].into_iter().enumerate() {
            let expected = if index == frozen { None } else { all.get(var).map(flat).transpose()? };
            assert_eq!(found.get(var).map(flat).transpose()?, expected, "{index} with {frozen} frozen");
        }
    }
    Ok(())
}

#[test]
fn without_variables_there_is_a_value_and_no_graph() -> Result<()> {
    let (queries, candidates) = (tensor(1, 5)?, tensor(2, 5)?);
    let loss = softmax_loss(&queries, &candidates, &Options::default())?;
    assert!(!loss.track_op());
    let variable = Var::from_tensor(&queries)?;
    let of_variables = softmax_loss(&variable, &candidates, &Options::default())?;
    assert_eq!(loss.to_scalar::<f32>()?, of_variables.to_scalar::<f32>()?);
    check_device(DEVICE).map_err(candle_core::Error::from)
}

/// What multiplies the loss multiplies the gradients, and a second use of a variable adds to them.
#[test]
fn a_part_of_a_larger_objective() -> Result<()> {
    let (queries, candidates) = (Var::from_tensor(&tensor(1, 5)?)?, Var::from_tensor(&tensor(2, 5)?)?);
    let loss = softmax_loss(&queries, &candidates, &Options::default())?;
    let alone = loss.backward()?;
    let penalty = queries.sqr()?.sum_all()?;
    let both = ((&loss * 2.0)? + &penalty)?.backward()?;
    let of = |var: &Var, both: f32, square: f32| {
        let d = flat(alone.get(var).expect("a gradient"))?;
        let values = flat(var)?;
        Ok::<Vec<f32>, candle_core::Error>(d.iter().zip(values).map(|(d, x)| both * d + square * 2.0 * x).collect())
    };
    for (var, expected) in [(&queries, of(&queries, 2.0, 1.0)?), (&candidates, of(&candidates, 2.0, 0.0)?)] {
        for (found, expected) in flat(both.get(var).expect("a gradient"))?.iter().zip(&expected) {
            assert!((found - expected).abs() <= 4.0 * f32::EPSILON * (1.0 + expected.abs()), "{found} {expected}");
        }
    }
    Ok(())
}

#[test]
fn the_same_step_is_bitwise_the_same() -> Result<()> {
    let (queries, candidates) = (Var::from_tensor(&tensor(1, 200)?)?, Var::from_tensor(&tensor(2, 300)?)?);
    let step = || {
        let gradients = softmax_loss(&queries, &candidates, &Options::default())?.backward()?;
        Ok::<_, candle_core::Error>([&queries, &candidates].map(|var| flat(gradients.get(var).expect("a gradient"))))
    };
    let first = step()?.map(|values| values.map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>()).ok());
    let second = step()?.map(|values| values.map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>()).ok());
    assert!(first.iter().all(Option::is_some));
    assert_eq!(first, second);
    Ok(())
}

/// A learned temperature of any shape of one element and any type has a gradient like it.
#[test]
fn temperatures() -> Result<()> {
    let (queries, candidates) = (tensor(1, 5)?, tensor(2, 5)?);
    let number = softmax_loss(&queries, &candidates, &Options { temperature: 0.25.into(), ..Options::default() })?;
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for shape in [vec![], vec![1], vec![1, 1]] {
            let temperature = Var::from_tensor(&Tensor::full(0.25f32, shape.clone(), DEVICE)?.to_dtype(dtype)?)?;
            let options = Options { temperature: temperature.as_tensor().into(), ..Options::default() };
            let loss = softmax_loss(&queries, &candidates, &options)?;
            assert_eq!(loss.to_scalar::<f32>()?, number.to_scalar::<f32>()?);
            let gradients = loss.backward()?;
            let gradient = gradients.get(&temperature).expect("a gradient");
            assert_eq!((gradient.dims(), gradient.dtype()), (&shape[..], dtype));
        }
    }
    Ok(())
}
