//! One distribution of several.

use super::{BLOCK, Distribution, RandomStream};
use crate::error::{Result, shape, value};

/// A mixture of distributions over the same items. The probability of an id is that of the whole mixture,
///
/// ```text
/// Q(id) = Σ_c w_c Q_c(id)
/// ```
///
/// whichever component drew it. An example is popular and uniform negatives in one pool (mixed negative sampling, Yang
/// et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in Recommendations", WWW 2020).
///
/// A component is chosen by 53 random bits, so the shares `w_c` are rounded to multiples of 2^-53 that sum to 1, and
/// the probabilities are computed from the rounded shares.
///
/// ```
/// use catalog_softmax::negatives::{Distribution, Mixture, Uniform, Unigram};
/// let popularity = Unigram::new(&[3.0, 1.0, 0.0, 0.0], 1.0)?;
/// let mixed = Mixture::new(vec![(3.0, Box::new(popularity)), (1.0, Box::new(Uniform::new(4)?))])?;
/// assert_eq!(mixed.probability(1), 0.75 * 0.25 + 0.25 * 0.25);
/// assert_eq!(mixed.probability(3), 0.25 * 0.25);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug)]
pub struct Mixture {
    components: Vec<Component>,
    num_items: u32,
    support: u32,
}

#[derive(Debug)]
struct Component {
    /// Its share of the draws, a multiple of 2^-53.
    weight: f64,
    /// Sum of the shares up to its own, 1 in the end.
    end: f64,
    distribution: Box<dyn Distribution>,
}

impl Mixture {
    /// Components with their weights, which need not sum to 1. Looks at each id once if no component alone draws them all.
    ///
    /// # Errors
    /// No component, a weight that is not finite and > 0 or whose share of the draws is below 2^-53, and components over different
    /// numbers of items.
    pub fn new(components: Vec<(f64, Box<dyn Distribution>)>) -> Result<Self> {
        let Some((_, first)) = components.first() else {
            return Err(shape("components", "none", "at least one"));
        };
        let num_items = first.num_items();
        for (c, (weight, distribution)) in components.iter().enumerate() {
            if !(weight.is_finite() && *weight > 0.0) {
                return Err(value(format!("components[{c}].weight"), weight, "finite and > 0"));
            }
            if distribution.num_items() != num_items {
                let found = format!("{} items", distribution.num_items());
                return Err(shape(
                    format!("components[{c}]"),
                    found,
                    format!("the first component's {num_items} items"),
                ));
            }
        }
        let weights: Vec<f64> = components.iter().map(|&(weight, _)| weight).collect();
        let mut end = 0.0;
        let with_share = |((_, distribution), weight): ((f64, Box<dyn Distribution>), f64)| {
            end += weight;
            Component { weight, end, distribution }
        };
        let components: Vec<Component> = components.into_iter().zip(shares(&weights)?).map(with_share).collect();
        let mut mixture = Mixture { components, num_items, support: 0 };
        let largest = mixture.components.iter().map(|c| c.distribution.support()).max();
        mixture.support = match largest {
            Some(support) if support == num_items => support,
            _ => (0..u64::from(num_items)).filter(|&id| mixture.probability(id) > 0.0).count() as u32,
        };
        Ok(mixture)
    }
}

/// Each weight's share of the 2^53 numbers that choose a component, so that their sum is 1 exactly.
fn shares(weights: &[f64]) -> Result<Vec<f64>> {
    const NUMBERS: u64 = 1 << 53;
    // Relative to the largest weight, so that the sum cannot overflow.
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let total: f64 = weights.iter().map(|weight| weight / largest).sum();
    let numbers = |(c, &weight): (usize, &f64)| match weight / largest / total * NUMBERS as f64 {
        numbers if numbers >= 1.0 => Ok(numbers.round() as u64),
        _ => Err(value(
            format!("components[{c}].weight"),
            weight,
            "at least 2^-53 of all weights' sum, to be drawn at all",
        )),
    };
    let mut numbers: Vec<u64> = weights.iter().enumerate().map(numbers).collect::<Result<_>>()?;
    // Rounding moved each share by half a number and some ulps, which the largest does not notice.
    let sum: u64 = numbers.iter().sum();
    if let Some(largest) = numbers.iter_mut().max() {
        *largest = *largest + NUMBERS - sum;
    }
    Ok(numbers.iter().map(|&numbers| numbers as f64 / NUMBERS as f64).collect())
}

impl Distribution for Mixture {
    fn num_items(&self) -> u32 {
        self.num_items
    }

    fn support(&self) -> u32 {
        self.support
    }

    fn probability(&self, id: u64) -> f64 {
        self.components.iter().map(|c| c.weight * c.distribution.probability(id)).sum()
    }

    fn draw_one(&self, random: &mut RandomStream) -> (u64, f64) {
        let (id, _) = self.components[self.choose(random)].distribution.draw_one(random);
        (id, self.probability(id))
    }

    /// Component by component, and probabilities last, so that the cache misses of each loop overlap.
    fn draw_into(&self, drawn: &mut [(u64, f64)], random: &mut RandomStream) {
        for drawn in drawn.chunks_mut(BLOCK) {
            let mut chosen = [0; BLOCK];
            let chosen = &mut chosen[..drawn.len()];
            chosen.iter_mut().for_each(|chosen| *chosen = self.choose(random));
            let mut scratch = [(0, 0.0); BLOCK];
            for (c, component) in self.components.iter().enumerate() {
                let places = || chosen.iter().enumerate().filter(|&(_, &chosen)| chosen == c).map(|(place, _)| place);
                let own = &mut scratch[..places().count()];
                component.distribution.draw_into(own, random);
                places().zip(own).for_each(|(place, own)| drawn[place] = *own);
            }
            drawn.iter_mut().zip(chosen).for_each(|(drawn, chosen)| drawn.1 = self.probability_of(*drawn, *chosen));
        }
    }
}

impl Mixture {
    /// The component of the next draw.
    fn choose(&self, random: &mut RandomStream) -> usize {
        let share = random.unit();
        // Counted without a branch that no one could predict. The last end is 1, past any share.
        self.components.iter().filter(|c| share >= c.end).count()
    }

    /// [`probability`](Distribution::probability) of an id that component `chosen` drew with this Q, which need not be looked
    /// up there again.
    fn probability_of(&self, (id, own): (u64, f64), chosen: usize) -> f64 {
        let of = |(c, component): (usize, &Component)| {
            component.weight * if c == chosen { own } else { component.distribution.probability(id) }
        };
        self.components.iter().enumerate().map(of).sum()
    }
}
