//! A catalogue with Zipf's popularity, and what sampled negatives make of one row's gradient: its mean and noise over many
//! steps, and its limit for many draws, against the gradient of the full softmax.

use catalog_softmax::negatives::{NegativeQueue, QueueOptions, union_gradient_weight, union_log_q};
use catalog_softmax::{
    Backend, Batch, Correction, Cpu, DType, Embeddings, Loss, Matrix, Pool, Reduction, Reference, Similarity,
};
use rand::RngExt;
use rand::rngs::StdRng;

use super::generate::{rng, rows};

/// Items.
pub const V: usize = 2000;
pub const DIM: usize = 16;
/// The most popular items, a twentieth of all.
pub const HEAD: usize = V / 20;
/// Of popularity rank 29: Q = 1 / (29 H_V), about 0.004.
pub const POSITIVE: usize = 28;

pub struct Catalogue {
    pub query: Vec<f32>,
    pub items: Vec<f32>,
    /// Of a draw by popularity.
    pub log_q: Vec<f32>,
    cumulative: Vec<f64>,
    /// Gradient of the full softmax by the query.
    pub exact: Vec<f64>,
    /// P of each item under the full softmax: the gradient of a negative item is P times the query.
    probability: Vec<f64>,
}

impl Catalogue {
    /// The positive's score is such that P(positive) = 0.57.
    pub fn new() -> Self {
        let mut rng = rng(7);
        let query = rows(&mut rng, 1, DIM, 0.5);
        let mut items = rows(&mut rng, V, DIM, 0.4);
        let harmonic: f64 = (1..=V).map(|rank| 1.0 / rank as f64).sum();
        let q: Vec<f64> = (1..=V).map(|rank| 1.0 / (rank as f64 * harmonic)).collect();
        let cumulative = q.iter().scan(0.0, |sum, q| {
            *sum += q;
            Some(*sum)
        });
        let cumulative = cumulative.collect();
        let others = items.chunks(DIM).enumerate().filter(|(j, _)| *j != POSITIVE);
        let others: f64 = others.map(|(_, item)| dot(item, &query).exp()).sum();
        let wanted = (others * 0.57 / 0.43).ln();
        let length = dot(&query, &query);
        let positive = &mut items[POSITIVE * DIM..(POSITIVE + 1) * DIM];
        positive.iter_mut().zip(&query).for_each(|(c, &q)| *c = (f64::from(q) * wanted / length) as f32);

        let batch = Batch::builder(Embeddings::new(&query, 1, DIM), Embeddings::new(&items, V, DIM));
        let positives = [POSITIVE as u32];
        let batch = batch.positives(&positives[..]).build().expect("a valid batch");
        let loss = Loss::softmax(Similarity::Dot, 1.0);
        let (output, gradients) = Reference::new().value_and_grad(&batch, &loss).expect("fits");
        assert!((output.probability[0] - 0.57).abs() < 1e-4, "{}", output.probability[0]);
        let along_query = |d: &[f64]| d.iter().zip(&query).map(|(&d, &q)| d * f64::from(q)).sum::<f64>() / length;
        let probability = gradients.d_candidates[0].values.chunks(DIM).map(along_query).collect();
        let log_q = q.iter().map(|q| q.ln() as f32).collect();
        Catalogue { query, items, log_q, cumulative, exact: gradients.d_queries.values, probability }
    }

    pub fn item(&self, j: usize) -> &[f32] {
        &self.items[j * DIM..(j + 1) * DIM]
    }

    pub fn draw_by_popularity(&self, rng: &mut StdRng) -> usize {
        let u: f64 = rng.random();
        self.cumulative.partition_point(|&c| c < u).min(V - 1)
    }

    /// L2 distance of a gradient from the full softmax's, relative to the latter.
    pub fn error(&self, gradient: &[f64]) -> f64 {
        let off: f64 = gradient.iter().zip(&self.exact).map(|(g, exact)| (g - exact).powi(2)).sum();
        (off / self.exact.iter().map(|exact| exact * exact).sum::<f64>()).sqrt()
    }
}

/// Where a pool's rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The other rows' positives, drawn by popularity.
    InBatch,
    Uniform,
    /// Positives of past steps, drawn by popularity, in a [`NegativeQueue`].
    Queue,
}

/// Which Q a pool's log_q is of. Counts are `n_k Q_k`, as a sum that stands beside the positive's `exp(s)` needs them;
/// under the corrected logQ all are divided by the number of draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Q {
    None,
    /// The expected count in the union of all pools.
    Union,
    /// The expected count in the pool itself: wrong for several pools.
    OwnCount,
    /// The pool's own distribution, weighted by its share `n_k / n` of the draws.
    OwnShare,
}

/// One way to take negatives.
#[derive(Debug, Clone)]
pub struct Setup {
    pub name: &'static str,
    pub pools: Vec<(Source, usize)>,
    pub correction: Correction,
    pub q: Q,
}

/// Mean and noise of the gradient over steps, relative to the length of the full softmax's.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Of the gradient by the query.
    pub mean: Vec<f64>,
    /// Distance of the mean from the full softmax's gradient, that is the bias and a trace of the noise.
    pub error: f64,
    /// Standard error of `mean`.
    pub standard_error: f64,
    /// Standard deviation of one step's gradient.
    pub noise: f64,
}

impl Setup {
    pub fn draws(&self) -> f64 {
        self.pools.iter().map(|&(_, n)| n as f64).sum()
    }

    /// Whether a queue is among the pools.
    pub fn is_queued(&self) -> bool {
        self.pools.iter().any(|&(source, _)| source == Source::Queue)
    }

    /// Natural log of the probability with which a source draws each item.
    fn distribution(&self, catalogue: &Catalogue, source: Source) -> Vec<f32> {
        match source {
            Source::InBatch | Source::Queue => catalogue.log_q.clone(),
            Source::Uniform => vec![-(V as f32).ln(); V],
        }
    }

    /// For each pool, log_q of each item of the catalogue.
    fn log_q(&self, catalogue: &Catalogue) -> Vec<Vec<f32>> {
        let per_draw = self.correction == Correction::CorrectedLogQ;
        let unit = if per_draw { self.draws() } else { 1.0 };
        let distributions: Vec<_> =
            self.pools.iter().map(|&(source, n)| (n as f64, self.distribution(catalogue, source))).collect();
        let union: Vec<(f64, &[f32])> = distributions.iter().map(|(n, log_q)| (n / unit, &log_q[..])).collect();
        let of = |pools: &[(f64, &[f32])]| {
            let mut log_q = vec![0.0; V];
            union_log_q(pools, &mut log_q).expect("every item is drawn");
            log_q
        };
        let own = |k: usize| match self.q {
            Q::None => Vec::new(),
            Q::Union => of(&union),
            Q::OwnCount => of(&union[k..=k]),
            Q::OwnShare => of(&[(self.draws() / unit, union[k].1)]),
        };
        (0..self.pools.len()).map(own).collect()
    }

    /// log_q of the positive, where the correction takes one.
    fn positive_log_q(&self, log_q: &[Vec<f32>]) -> Option<[f32; 1]> {
        let taken = matches!(self.correction, Correction::LogQ | Correction::CorrectedLogQ);
        taken.then(|| [log_q[0][POSITIVE]])
    }

    fn loss(&self) -> Loss {
        Loss::softmax(Similarity::Dot, 1.0).correction(self.correction).reduction(Reduction::Sum)
    }

    /// The gradient over `steps` independent steps. Draws of the positive are accidental hits, masked by their id.
    pub fn measure(&self, catalogue: &Catalogue, steps: usize, seed: u64) -> Measured {
        let mut rng = rng(seed);
        let log_q = self.log_q(catalogue);
        let (mut cpu, loss) = (Cpu::new(), self.loss());
        let (mut sum, mut squares) = ([0.0; DIM], [0.0; DIM]);
        for _ in 0..steps {
            let step = self.step(catalogue, &log_q, &loss, &mut cpu, &mut rng);
            for (k, &d) in step.d_query.iter().enumerate() {
                sum[k] += f64::from(d);
                squares[k] += f64::from(d).powi(2);
            }
        }
        let count = steps as f64;
        let mean: Vec<f64> = sum.iter().map(|sum| sum / count).collect();
        let variance: f64 = squares.iter().zip(&mean).map(|(square, mean)| square / count - mean * mean).sum();
        let size: f64 = catalogue.exact.iter().map(|exact| exact * exact).sum();
        let noise = (variance / size).sqrt();
        Measured { error: catalogue.error(&mean), mean, standard_error: noise / count.sqrt(), noise }
    }

    fn step(
        &self,
        catalogue: &Catalogue,
        log_q: &[Vec<f32>],
        loss: &Loss,
        cpu: &mut Cpu,
        rng: &mut StdRng,
    ) -> DrawnStep {
        let drawn: Vec<Drawn> = self
            .pools
            .iter()
            .zip(log_q)
            .map(|(&(source, n), log_q)| Drawn::new(catalogue, source, n, log_q, rng))
            .collect();
        let mut queues = Vec::new();
        for (drawn, _) in drawn.iter().zip(&self.pools).filter(|(_, (source, _))| *source == Source::Queue) {
            let mut options = QueueOptions::new(drawn.ids.len(), DIM, DType::F32).with_ids();
            if self.q != Q::None {
                options = options.with_log_q();
            }
            let mut queue = NegativeQueue::new(options).expect("valid options");
            queue.enqueue(&drawn.pool()).expect("rows that fit");
            queues.push(queue);
        }
        let fresh = drawn.iter().zip(&self.pools).filter(|(_, (source, _))| *source != Source::Queue);
        let mut pools = fresh.map(|(drawn, _)| drawn.pool()).chain(queues.iter().flat_map(NegativeQueue::pools));
        let first = pools.next().expect("a set-up has a pool");
        let (positive_ids, positive_log_q) = ([POSITIVE as u64], self.positive_log_q(log_q));
        let builder = Batch::builder(Embeddings::new(&catalogue.query, 1, DIM), first)
            .positive_embeddings(Embeddings::new(catalogue.item(POSITIVE), 1, DIM))
            .positive_ids(&positive_ids[..]);
        let mut builder = builder.pools(pools);
        if let Some(positive_log_q) = &positive_log_q {
            builder = builder.positive_log_q(positive_log_q);
        }
        let (_, gradients) = cpu.value_and_grad(&builder.build().expect("a valid batch"), loss).expect("fits");
        DrawnStep { d_query: gradients.d_queries.values, d_pools: gradients.d_candidates, drawn }
    }

    /// How much of the full softmax's gradient the negative items get, the [`HEAD`] most popular ones and the others: the mean
    /// over steps of their gradients' sum along the query, relative to that of the full softmax. With `weighted`, candidates'
    /// gradients are multiplied by their [`union_gradient_weight`].
    pub fn gradient_of_items(&self, catalogue: &Catalogue, steps: usize, seed: u64, weighted: bool) -> [f64; 2] {
        let mut rng = rng(seed);
        let (log_q, weight) = (self.log_q(catalogue), self.weight(catalogue));
        let (mut cpu, loss) = (Cpu::new(), self.loss());
        let length = dot(&catalogue.query, &catalogue.query);
        let mut sums = [0.0; 2];
        for _ in 0..steps {
            let step = self.step(catalogue, &log_q, &loss, &mut cpu, &mut rng);
            let fresh = step.drawn.iter().zip(&self.pools).filter(|(_, (source, _))| *source != Source::Queue);
            for ((drawn, _), d_pool) in fresh.zip(&step.d_pools) {
                for (&id, d) in drawn.ids.iter().zip(d_pool.values.chunks(DIM)) {
                    let weight = if weighted { f64::from(weight[id as usize]) } else { 1.0 };
                    sums[usize::from(id >= HEAD as u64)] += weight * dot(d, &catalogue.query) / length;
                }
            }
        }
        let negatives = (0..V).filter(|&j| j != POSITIVE);
        let (head, tail): (Vec<usize>, Vec<usize>) = negatives.partition(|&j| j < HEAD);
        let exact = [head, tail].map(|items| items.into_iter().map(|j| catalogue.probability[j]).sum::<f64>());
        [0, 1].map(|part| sums[part] / steps as f64 / exact[part])
    }

    fn weight(&self, catalogue: &Catalogue) -> Vec<f32> {
        let distributions: Vec<_> =
            self.pools.iter().map(|&(source, _)| self.distribution(catalogue, source)).collect();
        let pools = self.pools.iter().zip(&distributions);
        let pools: Vec<(f64, &[f32], bool)> =
            pools.map(|(&(source, n), log_q)| (n as f64, &log_q[..], source != Source::Queue)).collect();
        let mut weight = vec![0.0; V];
        union_gradient_weight(&pools, &mut weight).expect("every item is drawn with a gradient");
        weight
    }

    /// What [`gradient_of_items`](Setup::gradient_of_items) tends to without weights: the share of draws that have a gradient,
    /// in the mean over items by their probability.
    pub fn limit_of_items(&self, catalogue: &Catalogue) -> [f64; 2] {
        let weight = self.weight(catalogue);
        [0..HEAD, HEAD..V].map(|items| {
            let (mut reached, mut whole) = (0.0, 0.0);
            for j in items.filter(|&j| j != POSITIVE) {
                reached += catalogue.probability[j] / f64::from(weight[j]);
                whole += catalogue.probability[j];
            }
            reached / whole
        })
    }

    /// What the gradient tends to for many draws in these proportions, by enumeration: sums over negatives are their
    /// expectations `Σ_k n_k Σ_j Q_k(j) exp(s_j − log_q_kj)`.
    pub fn limit(&self, catalogue: &Catalogue) -> Vec<f64> {
        let log_q = self.log_q(catalogue);
        let score = |j: usize| dot(catalogue.item(j), &catalogue.query);
        let (mut sum, mut expected, mut negatives) = (0.0, [0.0; DIM], 0.0);
        for (&(source, n), log_q) in self.pools.iter().zip(&log_q) {
            let q = self.distribution(catalogue, source);
            for j in (0..V).filter(|&j| j != POSITIVE) {
                let draws = n as f64 * f64::from(q[j]).exp();
                let term = draws * (score(j) - log_q.get(j).map_or(0.0, |&l| f64::from(l))).exp();
                negatives += draws;
                sum += term;
                expected.iter_mut().zip(catalogue.item(j)).for_each(|(e, &c)| *e += term * f64::from(c));
            }
        }
        let positive_q = self.positive_log_q(&log_q).map_or(1.0, |[log_q]| f64::from(log_q).exp());
        let odds = match self.correction {
            Correction::CorrectedLogQ => sum * (1.0 - positive_q) / negatives,
            Correction::LogQ => sum * positive_q,
            _ => sum,
        } / score(POSITIVE).exp();
        let coefficient = odds / (1.0 + odds);
        let item = catalogue.item(POSITIVE);
        expected.iter().zip(item).map(|(e, &p)| coefficient * (e / sum - f64::from(p))).collect()
    }
}

/// Gradients of a step.
struct DrawnStep {
    d_query: Vec<f32>,
    /// Of the pools in order; a queue's have none.
    d_pools: Vec<Matrix<f32>>,
    drawn: Vec<Drawn>,
}

/// One pool's draws.
struct Drawn {
    items: Vec<f32>,
    ids: Vec<u64>,
    log_q: Option<Vec<f32>>,
}

impl Drawn {
    fn new(catalogue: &Catalogue, source: Source, n: usize, log_q: &[f32], rng: &mut StdRng) -> Self {
        let draw = |_| match source {
            Source::Uniform => rng.random_range(0..V),
            Source::InBatch | Source::Queue => catalogue.draw_by_popularity(rng),
        };
        let drawn: Vec<usize> = (0..n).map(draw).collect();
        Drawn {
            items: drawn.iter().flat_map(|&j| catalogue.item(j).iter().copied()).collect(),
            ids: drawn.iter().map(|&j| j as u64).collect(),
            log_q: (!log_q.is_empty()).then(|| drawn.iter().map(|&j| log_q[j]).collect()),
        }
    }

    fn pool(&self) -> Pool<'_> {
        let pool = Pool::new(Embeddings::new(&self.items, self.ids.len(), DIM)).ids(&self.ids);
        match &self.log_q {
            Some(log_q) => pool.log_q(log_q),
            None => pool,
        }
    }
}

/// The set-ups of the table: a batch of `b` rows, as many uniform draws, and a queue of four batches.
pub fn setups(b: usize) -> Vec<Setup> {
    let (in_batch, uniform, queue) = ((Source::InBatch, b - 1), (Source::Uniform, b), (Source::Queue, 4 * b));
    let setup = |name, pools: &[(Source, usize)], correction, q| Setup { name, pools: pools.to_vec(), correction, q };
    use Correction::{CorrectedLogQ, LogQ, LogQNegativesOnly};
    vec![
        setup("in-batch, no logQ", &[in_batch], Correction::None, Q::None),
        setup("in-batch, logQ", &[in_batch], LogQ, Q::Union),
        setup("in-batch, corrected logQ", &[in_batch], CorrectedLogQ, Q::Union),
        setup("in-batch, counts", &[in_batch], LogQNegativesOnly, Q::Union),
        setup("uniform, counts", &[uniform], LogQNegativesOnly, Q::Union),
        setup("in-batch + uniform, one Q", &[in_batch, uniform], LogQNegativesOnly, Q::Union),
        setup("in-batch + uniform, a Q each", &[in_batch, uniform], LogQNegativesOnly, Q::OwnCount),
        setup("in-batch + uniform, shares", &[in_batch, uniform], LogQNegativesOnly, Q::OwnShare),
        setup("+ queue, one Q", &[in_batch, uniform, queue], LogQNegativesOnly, Q::Union),
        setup("+ queue, a Q each", &[in_batch, uniform, queue], LogQNegativesOnly, Q::OwnCount),
        setup("+ queue, one Q, corrected logQ", &[in_batch, uniform, queue], CorrectedLogQ, Q::Union),
    ]
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
