//! Replays one training step from a file: computes it with a backend, compares with what the file expects, writes what
//! came out.
//!
//! ```text
//! cargo run --release --example replay -- tests/golden/*.safetensors --backend cpu
//! cargo run --release --example replay -- my_step.safetensors --backend reference --out results.safetensors
//! ```
//!
//! `docs/replay.md` describes the file, has ten lines of Python that write one, and explains the verdicts. Exits with 1
//! where a result is past tolerance and with 2 where a file or the device cannot be used.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use catalog_softmax::{Backend, DType, Device, Reference};
use clap::{Parser, ValueEnum};
use safetensors::serialize_to_file;
use safetensors::tensor::TensorView;

use catalog_softmax_testing::golden::Golden;
use catalog_softmax_testing::golden_check::{Claim, Precision, Results, Verdict, judge, results};
use catalog_softmax_testing::golden_files::stored;

/// Computes the training step in each FILE and compares it with the results that the file holds.
#[derive(Parser)]
#[command(after_long_help = FORMAT)]
struct Args {
    /// Training steps, in safetensors; --help lists the tensors
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// Write the results here, in safetensors; with one FILE only
    #[arg(long)]
    out: Option<PathBuf>,
    /// Largest error allowed, as a share of the terms that an element is a sum of. Without it: 1e-9 for the reference;
    /// for the others four times the error of a plain f32 computation against float64, which takes 8 bytes for each
    /// pair of a query and a candidate
    #[arg(long)]
    tolerance: Option<f64>,
}

const FORMAT: &str = "\
A FILE holds (B queries, N candidates, D elements of an embedding):
  queries (B, D), candidates (N, D)   F32, F16 or BF16, before any normalisation
  positives (B)                       I64 rows of candidates, or positive_embeddings (B, D)
  optional                            candidate_ids, positive_ids, exclude_offsets, exclude_ids,
                                      positive_offsets (I64); log_q, positive_log_q, positive_weight,
                                      row_weight (F32)
  over a table (M, D)                 in place of candidates: candidate_rows (N), row_negatives (B, K) (I64),
                                      row_negatives_log_q (F32); positives are its rows
  metadata                            similarity cosine|dot, temperature, loss softmax|corrected_logq
  optional                            correct_positive true|false, reduction mean|sum|weighted_mean|none,
                                      symmetric true|false, false_negative_margin, false_negative_ratio, note
  results, all optional               expected.loss, .total, .lse, .positive, .d_queries, .d_candidates,
                                      .d_positive_embeddings, .d_table, .d_temperature (F64 or F32),
                                      .num_negatives (I64)

What was found and what the file holds are each compared with the float64 reference:
  ok           both are right as far as their arithmetic can be
  BAD in file  the value was found right, and the file holds another one
  BAD found    the file is right, and the backend is wrong
  BAD both     neither is right
Exit code: 0 if all is ok, 1 if something is BAD, 2 if a file or the device cannot be used.

docs/replay.md has a Python program that writes a FILE, and says how the tolerances come about.";

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum BackendName {
    Reference,
    Cpu,
    Cuda,
}

fn main() -> ExitCode {
    ExitCode::from(exit_code(&Args::parse()))
}

fn exit_code(args: &Args) -> u8 {
    if args.out.is_some() && args.files.len() > 1 {
        eprintln!("--out takes the results of one FILE, and there are {}", args.files.len());
        return 2;
    }
    match replay_on(args) {
        Ok(Tally { unusable, .. }) if unusable > 0 => 2,
        Ok(Tally { failed, .. }) if failed > 0 => 1,
        Ok(_) => 0,
        Err(error) => {
            eprintln!("{error}");
            2
        }
    }
}

fn replay_on(args: &Args) -> catalog_softmax::Result<Tally> {
    Ok(match args.backend {
        BackendName::Reference => replay_all(args, &mut Reference::new()),
        BackendName::Cpu => replay_all(args, Device::Cpu.open()?.as_mut()),
        BackendName::Cuda => replay_all(args, Device::Cuda(0).open()?.as_mut()),
    })
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    not_compared: usize,
    unusable: usize,
}

fn replay_all<B: Backend + ?Sized>(args: &Args, backend: &mut B) -> Tally {
    let mut tally = Tally::default();
    for file in &args.files {
        println!("{}", file.display());
        match replay(args, backend, file) {
            Ok(verdicts) if verdicts.is_empty() => tally.not_compared += 1,
            Ok(verdicts) if verdicts.iter().all(Verdict::passes) => tally.passed += 1,
            Ok(_) => tally.failed += 1,
            Err(error) => {
                eprintln!("  {}: {error}", file.display());
                tally.unusable += 1;
            }
        }
    }
    let Tally { passed, failed, not_compared, unusable } = tally;
    println!("{passed} passed, {failed} failed, {not_compared} with nothing to compare, {unusable} not usable");
    tally
}

fn replay<B: Backend + ?Sized>(args: &Args, backend: &mut B, file: &Path) -> Result<Vec<Verdict>, Box<dyn Error>> {
    let golden = Golden::load(file)?;
    let step = backend.value_and_grad(&golden.problem.batch()?, &golden.problem.loss)?;
    let found = results(&step.into());
    print_summary(&golden, &found);
    if let Some(out) = &args.out {
        write(&found, out)?;
    }
    if golden.expected.is_empty() {
        return Ok(Vec::new());
    }
    let verdicts = judge(&golden, &found, precision(args, &golden));
    print_verdicts(&verdicts);
    Ok(verdicts)
}

fn precision(args: &Args, golden: &Golden) -> Precision {
    match (args.tolerance, args.backend) {
        (Some(tolerance), _) => Precision::Within(tolerance),
        (None, BackendName::Reference) => Precision::Float64,
        (None, BackendName::Cpu) => Precision::Single { operands: DType::F32 },
        // The CUDA backend rounds probabilities to the type of the embeddings.
        (None, BackendName::Cuda) => Precision::Single { operands: golden.problem.queries.dtype() },
    }
}

fn print_summary(golden: &Golden, found: &Results) {
    let problem = &golden.problem;
    let (b, n, d) = (problem.num_queries(), problem.num_candidates(), problem.dim);
    let dtype = problem.queries.view(d).dtype();
    let total = found["total"].values[0];
    let own = problem.row_negatives.as_ref().map_or(0, |own| own.per_row);
    match problem.table_rows() {
        0 => println!("  {b} queries, {n} candidates, dim {d}, {dtype:?}; total {total:.9}"),
        m => println!(
            "  {b} queries, {n} candidates and {own} of each query's own in a table of {m}, dim {d}, {dtype:?}; total {total:.9}"
        ),
    }
}

/// Of each result, the element that is furthest off in units of its tolerance.
fn print_verdicts(verdicts: &[Verdict]) {
    println!(
        "  {:<22} {:<13} {:>8} {:>18} {:>9} {:>9} {:>18} {:>9} {:>9} {:>18}",
        "result", "verdict", "worst at", "right", "found off", "allowed", "found", "file off", "allowed", "in the file"
    );
    for Verdict { name, at, right, found, expected } in verdicts {
        let verdict = match (found.passes(), expected.passes()) {
            (true, true) => "ok",
            (true, false) => "BAD in file",
            (false, true) => "BAD found",
            (false, false) => "BAD both",
        };
        let claim = |c: &Claim| format!("{:>9.2e} {:>9.2e} {:>18.10e}", c.error, c.tolerance, c.value);
        println!("  {name:<22} {verdict:<13} {at:>8} {right:>18.10e} {} {}", claim(found), claim(expected));
    }
}

fn write(found: &Results, path: &Path) -> Result<(), Box<dyn Error>> {
    let bytes: Vec<_> = found.iter().map(|(name, tensor)| (*name, tensor, stored(tensor))).collect();
    let views = bytes
        .iter()
        .map(|(name, tensor, bytes)| Ok((*name, TensorView::new(tensor.dtype, tensor.shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_, safetensors::SafeTensorError>>()?;
    Ok(serialize_to_file(views, None, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use catalog_softmax_testing::golden_files::to_bytes;

    /// Replays a golden batch with its expectations edited.
    fn replayed(backend: &str, edit: impl FnOnce(&mut Golden)) -> u8 {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("step.safetensors");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/in_batch_logq.safetensors");
        let mut golden = Golden::load(Path::new(source)).expect("a golden batch");
        edit(&mut golden);
        std::fs::write(&file, to_bytes(&golden).expect("a file")).expect("written");
        let file = file.to_str().expect("UTF-8");
        exit_code(&Args::parse_from(["replay", file, "--backend", backend]))
    }

    #[test]
    fn the_exit_code_is_the_verdict() {
        for backend in ["cpu", "reference"] {
            assert_eq!(replayed(backend, |_| ()), 0);
            for wrong in [99.0, f64::NAN] {
                let spoil = |golden: &mut Golden| {
                    golden.expected.get_mut("total").expect("expected").values[0] = wrong;
                };
                assert_eq!(replayed(backend, spoil), 1, "{backend}, {wrong}");
            }
            assert_eq!(replayed(backend, |golden| golden.expected.clear()), 0);
            assert_eq!(replayed(backend, |golden| golden.problem.loss.temperature = 0.0), 2);
        }
    }
}
