// gac/fused/statistics.py and gac/fused/law.py line by line; gac/statistics/ and gac/laws/gac.py say why.
#include "step_end.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gac {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int kSteady = 1024;      // the table's last row, which stays
constexpr double kApart = 1e-9;    // averages that are nearer give no evidence

// NaN stays NaN.
double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
double above_0(double x) { return x < 0 ? 0 : x; }
// From whichever end is nearer, as torch.lerp.
double lerp(double a, double b, double weight) {
  return weight < 0.5 ? a + weight * (b - a) : b - (b - a) * (1 - weight);
}
double number(bool known, double x) { return known ? x : kNan; }

struct Statistics {
  double sigma[2], delta_g2, distance2, norm2[2], dot, n[2], nonfinite;
};

Statistics nothing() { return {{kNan, kNan}, kNan, kNan, {kNan, kNan}, kNan, {0, 0}, 0}; }

Statistics from_sums(const double* sums, const gac_ending& ending) {
  Statistics found = nothing();
  const double* const norms = sums + GAC_NORMS;
  for (int k = 0; k < 2; ++k) {
    const double n = found.n[k] = ending.present >> k & 1 ? sums[GAC_COUNTS + k] : 0;  // weight 0 leaves no trace
    found.norm2[k] = number(n >= 1, norms[k]);
    if (ending.lone >> k & 1)
      found.sigma[k] = number(n > 0, sums[GAC_TIME_NOISE + k]);
    else if (n >= 2)
      found.sigma[k] = above_0(sums[GAC_POWER + k] * sums[GAC_TOKENS + k] - norms[k]) / (n - 1);
  }
  found.dot = number(found.n[0] >= 1 && found.n[1] >= 1, norms[2]);
  found.distance2 = above_0(found.norm2[0] + found.norm2[1] - 2 * found.dot);
  found.delta_g2 = found.distance2 - (found.sigma[0] + found.sigma[1]);
  found.nonfinite = sums[GAC_NONFINITE];
  return found;
}

Statistics as_told(const double* x) { return {{x[0], x[1]}, x[2], x[3], {x[4], x[5]}, x[6], {x[7], x[8]}, x[9]}; }

// Standard errors, by differences of successive steps: errors[4], and whether an estimate has moved beyond them.
bool take_errors(const Statistics& found, bool healthy, const gac_ending& ending, double* state, double* errors) {
  const double estimates[4] = {found.sigma[0], found.sigma[1], found.distance2, found.delta_g2};
  double *const last = state + GAC_LAST, *const level = last + 4, *const average = last + 8, *const count = last + 12;
  bool moved = false;
  for (int k = 0; k < 4; ++k) {
    const double estimate = estimates[k], before = last[k];
    const bool use = healthy && std::isfinite(estimate);
    if (use) count[k] += 1;
    const double* const at = ending.table + 3 * static_cast<int>(std::min<double>(count[k], kSteady));
    double squared = average[k];
    if (use) {
      level[k] = lerp(level[k], std::fabs(estimate), at[0]);
      if (count[k] >= 2) {
        const double difference = estimate == before ? 0 : (estimate - before) / level[k];
        squared = difference * difference / 2;
      }
      last[k] = estimate;
    }
    average[k] = lerp(average[k], squared, at[1]);
    errors[k] = level[k] * std::sqrt(average[k]) * at[2];
    moved |= std::fabs(estimate - before) > ending.options[GAC_SURPRISE] * errors[k];
  }
  return moved;
}

// The target's weight; where it follows KL the state gets what it has become.
double alpha_of(const gac_ending& ending, double* state) {
  if (!ending.follows_kl) return ending.alpha;
  const double* const o = ending.options;
  double &alpha = state[GAC_ALPHA], &kl = state[GAC_KL];
  const double told = ending.kl;
  if (std::isfinite(told)) kl = std::isfinite(kl) ? o[GAC_KL_DECAY] * kl + (1 - o[GAC_KL_DECAY]) * told : told;
  const double error = clamp(kl / o[GAC_KL_TARGET] - 1, -1, 1);
  const double up = o[GAC_ETA_UP] * above_0(error - o[GAC_HYSTERESIS]) * (o[GAC_ALPHA_MAX] - alpha);
  const double down = o[GAC_ETA_DOWN] * above_0(-error - o[GAC_HYSTERESIS]) * (alpha - o[GAC_ALPHA_MIN]);
  if (std::isfinite(kl)) alpha = alpha + up - down;
  return alpha;
}

// The error, measured in this step, of the mu that both averages of the steps before gave.
void compare(const Statistics& found, const gac_ending& ending, double alpha, double* state) {
  const double noise = ending.options[GAC_NOISE], *const mus = state + GAC_MUS, *const waiting = state + GAC_WAITING;
  double apart = mus[1] - mus[0];
  if (!(std::fabs(apart) > kApart)) apart = 0;
  const double sigma_s2 = noise * found.sigma[0], sigma_r2 = noise * found.sigma[1];
  const double total = found.delta_g2 + sigma_s2 + sigma_r2;
  const double difference = apart * ((mus[1] + mus[0]) * total - 2 * (alpha * found.delta_g2 + sigma_r2));
  if (!std::isfinite(difference)) return;
  const double longest = std::max({waiting[0], waiting[1], waiting[2]});
  const double keep = std::exp(-ending.options[GAC_FORGET] * longest);
  double* const evidence = state + GAC_EVIDENCE;
  evidence[0] = keep * evidence[0] + difference;
  evidence[1] = keep * keep * evidence[1] + difference * difference;
}

// Takes the measurements into the averages; what they add to the cap.
double smooth(const Statistics& found, bool healthy, const double* errors, const gac_ending& ending, double alpha,
              double* state) {
  const double value[3] = {found.sigma[0], found.sigma[1], found.delta_g2};
  double *const waiting = state + GAC_WAITING, *const unsettled = state + GAC_UNSETTLED;
  bool use[3];
  for (int k = 0; k < 3; ++k) use[k] = healthy && std::isfinite(value[k]);
  if (ending.averages == 2 && use[0] && use[1] && use[2]) compare(found, ending, alpha, state);
  double news = 0;
  for (int k = 0; k < 3; ++k) {
    if (!use[k]) continue;
    const bool first = state[GAC_AVERAGES + 6 * (ending.averages - 1) + 3 + k] == 0, sure = std::isfinite(errors[k]);
    const double squared = sure ? errors[k] * errors[k] : 0;
    double keep = 0, share = 0;
    for (int i = 0; i < ending.averages; ++i) {
      double *const sums = state + GAC_AVERAGES + 6 * i + k, *const squares = state + GAC_SQUARES + 9 * i + k;
      keep = std::exp(-ending.options[GAC_RATES + 2 * i] * waiting[k]);
      share = ending.options[GAC_RATES + 2 * i + 1];
      sums[0] = share * value[k] + keep * sums[0];
      sums[3] = share + keep * sums[3];
      const double share2 = share * share, keep2 = keep * keep;
      squares[0] = share2 * squared + keep2 * squares[0];
      squares[3] = (sure ? share2 : 0) + keep2 * squares[3];
      squares[6] = share2 + keep2 * squares[6];
    }
    if (!first) unsettled[k] *= keep;
    const double gain = unsettled[k] * (share / state[GAC_AVERAGES + 6 * (ending.averages - 1) + 3 + k]);
    if (gain > news) news = gain;
  }
  for (int k = 0; k < 3; ++k)
    if (use[k]) waiting[k] = 0;
  return news;
}

struct Estimate {
  double raw, error;  // NaN where unknown
};

Estimate estimate(const gac_ending& ending, double alpha, double* state) {
  const double noise = ending.options[GAC_NOISE];
  Estimate found[2];
  for (int i = 0; i < ending.averages; ++i) {
    const double *const sums = state + GAC_AVERAGES + 6 * i, *const squares = state + GAC_SQUARES + 9 * i;
    double mean[3], error[3];
    for (int k = 0; k < 3; ++k) {
      mean[k] = above_0(sums[k] / sums[3 + k]);
      error[k] = std::sqrt(squares[k] * squares[6 + k] / squares[3 + k]) / sums[3 + k];
    }
    const double whole = mean[2] + noise * (mean[0] + mean[1]);
    const double raw = (alpha * mean[2] + noise * mean[1]) / (mean[2] + noise * mean[0] + noise * mean[1]);
    const double levers[3] = {alpha - (1 - noise) * raw, alpha - noise - (1 - noise) * raw, raw - alpha};
    double square = 0;
    for (int k = 0; k < 3; ++k) {
      const double part = levers[k] * (error[k] / whole);
      square += part * part;
    }
    found[i] = {raw, std::sqrt(square)};
  }
  if (ending.averages == 1) return found[0];
  state[GAC_MUS] = found[0].raw, state[GAC_MUS + 1] = found[1].raw;
  const double evidence = state[GAC_EVIDENCE], squares = state[GAC_EVIDENCE + 1];
  const double ahead = squares > 0 ? evidence / std::sqrt(squares) : 0;
  const double follows = 1 / (1 + std::exp(-2 * (ahead - 2)));
  Estimate blend = found[1];
  if (blend.error != found[0].error) blend.error = lerp(blend.error, found[0].error, follows);
  blend.raw = lerp(blend.raw, found[0].raw, follows);
  return blend;
}

// mu after steps in which nothing was measured: it goes on towards its estimate.
double coast(double mu, double target, int64_t steps, const double* o) {
  for (; steps > 0; --steps) {
    const double moved = clamp(mu + clamp(target - mu, -o[GAC_CAP], o[GAC_CAP]), o[GAC_MU_MIN], o[GAC_MU_MAX]);
    if (moved == mu) break;
    mu = moved;
  }
  return mu;
}

double weight_of_prior(const double* o, double error) {
  if (o[GAC_PRIOR_WEIGHT] == o[GAC_PRIOR_WEIGHT]) return o[GAC_PRIOR_WEIGHT];
  const double ratio = o[GAC_PRIOR_SD] / error, weight = 1 / (1 + ratio * ratio);
  return weight == weight ? weight : o[GAC_UNKNOWN_WEIGHT];
}

// What mu leans on; NaN where there is nothing.
double prior_of(const gac_ending& ending, double mu) {
  if (!ending.prior_is_tensor) return ending.prior;
  return std::isfinite(ending.prior) ? clamp(ending.prior, 0, 1) : mu;
}

// Quotients and differences of float32 numbers that float64 rounds first come out the same.
void write_weights(double mu, float* weights) {
  weights[0] = static_cast<float>(mu);
  weights[1] = static_cast<float>(1.0 - static_cast<double>(weights[0]));
  for (int k = 0; k < 2; ++k)
    weights[2 + k] = weights[k] > 0 ? static_cast<float>(1.0 / static_cast<double>(weights[k])) : 0.0f;
}

}  // namespace

void step_end(const gac_ending& ending) {
  const double* const o = ending.options;
  double* const state = ending.state;
  if (ending.passed) {
    const double raw = state[GAC_ROW_RAW], mu = state[GAC_MU];
    state[GAC_MU] = coast(mu, std::isfinite(raw) ? raw : mu, ending.passed, o);
    for (int k = 0; k < 3; ++k) state[GAC_WAITING + k] += static_cast<double>(ending.passed);
  }
  const bool measured = ending.source != nullptr;
  const Statistics found = !measured                ? nothing()
                           : ending.from_statistics ? as_told(ending.source)
                                                    : from_sums(ending.source, ending);
  const bool healthy = found.nonfinite == 0;
  double errors[4] = {kNan, kNan, kNan, kNan};
  bool moved = false;
  if (measured) moved = take_errors(found, healthy, ending, state, errors);

  const double alpha = alpha_of(ending, state);
  for (int k = 0; k < 3; ++k) state[GAC_WAITING + k] += 1;
  double news = measured ? smooth(found, healthy, errors, ending, alpha, state) : 0;
  const Estimate now = estimate(ending, alpha, state);
  const double mu = state[GAC_MU], prior = prior_of(ending, mu);
  const bool known = std::isfinite(now.raw);
  double target = known ? now.raw : mu;
  if (prior == prior) {
    const double weight = weight_of_prior(o, now.error);
    target = known ? lerp(now.raw, prior, weight) : prior;
    news = known ? news * (1 - weight) : 0;
  }
  if (healthy) {
    const double reach = o[GAC_CAP] + news;
    state[GAC_MU] = clamp(mu + clamp(target - mu, -reach, reach), o[GAC_MU_MIN], o[GAC_MU_MAX]);
  }
  write_weights(state[GAC_MU], ending.weights);
  state[GAC_MOVED] = moved;

  const double cosine = found.dot / (std::sqrt(found.norm2[0]) * std::sqrt(found.norm2[1]));
  const double skipped = state[GAC_ROW_SKIPPED] + (healthy ? 0 : 1);
  const double row[] = {ending.weights[0], now.raw,          now.error,      prior,          skipped,
                        found.sigma[0],    found.sigma[1],   found.delta_g2, found.distance2, found.norm2[0],
                        found.norm2[1],    found.dot,        found.n[0],     found.n[1],     found.nonfinite,
                        errors[0],         errors[1],        errors[2],      errors[3],      cosine};
  static_assert(sizeof row == GAC_MU * sizeof(double), "a row comes before the rest");
  std::copy(row, row + GAC_MU, state);
}

}  // namespace gac
