// One row's distillation loss and its gradient: what megatron_pd/distill/objective.py composes of
// PyTorch operations, in one go over the row's K entries. The same code runs on the CPU, one thread
// a row, and on a GPU, one warp a row.
//
//   t   the teacher's measure at τ on the row's outcomes: log t = ℓ/τ − shift, and for some
//       policies one outcome more
//   q   the student's, at temperature 1; of the extra outcome either its mass off the row, 1 − P
//       with P = Σ q, or that of the label
//
// A divergence is a sum of terms f(log t, log q). The student's log-probabilities are the inputs,
// so the gradient is ∂f/∂log q of each entry, and where the extra outcome is 1 − P also that one's,
// by ∂log(1 − P)/∂log q = −q / (1 − P).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../host_device.h"

namespace megatron_pd {

// --pd-tail, --pd-loss, and what a row's loss is multiplied by: docs/losses.md.
enum class Tail { kRenormalize, kRaw, kGhost, kToLabel, kDecoupled, kSampled };
enum class Loss { kNll, kKld, kReverseKld, kJsd, kMseProb };
enum class Weight { kOne, kTauSquared, kTemperedMass };

template <class Number>
struct Divergence {
  Tail tail;
  Loss loss;
  Weight weight;
  Number beta;  // of kJsd

  // kJsd: what each unit of the student's mass off the outcomes costs.
  MEGATRON_PD_HOST_DEVICE Number unit_cost() const { return -(1 - beta) * std::log1p(-beta); }
};

template <class Number>
struct TeacherRow {
  const int32_t* ids;
  const Number* log_t;  // full vocabulary, τ = 1
  int64_t count;
  Number tau;
  int64_t label;
};

template <class Number>
struct StudentRow {
  const Number* log_q;
  Number label_log_q;
};

template <class Number>
struct RowGradient {
  Number* log_q;  // K columns
  int64_t columns;
  Number* label_log_q;
};

// f and ∂f/∂log q of one outcome.
template <class Number>
struct Term {
  Number value, slope;
};

// A teacher's tail below this is rounding: _ROUNDING of megatron_pd/distill/rows.py.
constexpr double kTeacherRounding = 1e-5;

template <class Number>
MEGATRON_PD_HOST_DEVICE Number log_add(Number a, Number b) {
  const Number larger = a > b ? a : b, smaller = a > b ? b : a;
  return larger + std::log1p(std::exp(smaller - larger));
}

template <class Number>
MEGATRON_PD_HOST_DEVICE Term<Number> term(const Divergence<Number>& divergence, Number log_t,
                                          Number log_q) {
  const Number t = std::exp(log_t);
  switch (divergence.loss) {
    case Loss::kNll:
      return {-t * log_q, -t};
    case Loss::kKld:
      return {t * (log_t - log_q), -t};
    case Loss::kReverseKld: {
      const Number q = std::exp(log_q);
      return {q * (log_q - log_t) - q + t, q * (log_q - log_t)};
    }
    case Loss::kJsd: {
      const Number beta = divergence.beta, q = std::exp(log_q), unit_cost = divergence.unit_cost();
      const Number log_m = log_add(log_t + std::log(beta), log_q + std::log1p(-beta));
      const Number student = (1 - beta) * (log_q - log_m) - unit_cost;
      return {beta * t * (log_t - log_m) + q * student, q * student};
    }
    case Loss::kMseProb: {
      const Number q = std::exp(log_q);
      return {(t - q) * (t - q), -2 * (t - q) * q};
    }
  }
  return {};
}

// Masses of the teacher's row, as logarithms.
template <class Number>
struct TeacherMasses {
  Number at_one;  // log a
  Number at_tau;  // log Σ t^(1/τ)
  bool has_tail;
  Number tail;  // log(1 − a)

  template <class Group>
  MEGATRON_PD_HOST_DEVICE TeacherMasses(const Group& group, const TeacherRow<Number>& row) {
    Number largest = -std::numeric_limits<Number>::infinity();
    for (int64_t j = group.lane(); j < row.count; j += group.size()) {
      largest = row.log_t[j] > largest ? row.log_t[j] : largest;
    }
    largest = group.max(largest);
    Number sum = 0, tempered_sum = 0;
    for (int64_t j = group.lane(); j < row.count; j += group.size()) {
      sum += std::exp(row.log_t[j] - largest);
      if (row.tau != 1) tempered_sum += std::exp((row.log_t[j] - largest) / row.tau);
    }
    at_one = largest + std::log(group.sum(sum));
    at_tau = row.tau == 1 ? at_one : largest / row.tau + std::log(group.sum(tempered_sum));
    const Number rest = -std::expm1(at_one);
    has_tail = rest > Number(kTeacherRounding);
    tail = has_tail ? std::log(rest) : 0;
  }
};

// What the student leaves off the row, 1 − P. Below the floor it counts as the floor and so keeps a
// slope, so that a student that puts all its mass on the row is still pushed off it.
template <class Number, class Group>
MEGATRON_PD_HOST_DEVICE Number student_rest(const Group& group, const Number* log_q,
                                            int64_t count) {
  Number mass = 0;
  for (int64_t j = group.lane(); j < count; j += group.size()) mass += std::exp(log_q[j]);
  const Number rest = 1 - group.sum(mass), floor = 8 * std::numeric_limits<Number>::epsilon();
  return rest > floor ? rest : floor;
}

template <class Number>
MEGATRON_PD_HOST_DEVICE Number weight_of(const Divergence<Number>& divergence, Number tau,
                                         Number log_tempered_mass) {
  switch (divergence.weight) {
    case Weight::kOne:
      return 1;
    case Weight::kTauSquared:
      return tau * tau;
    case Weight::kTemperedMass:
      return std::exp(log_tempered_mass);
  }
  return 1;
}

// The loss of one row, by all threads of `group` together, each with every size()-th entry; all get
// the result. A row without entries has loss and gradient 0.
template <class Number, class Group>
MEGATRON_PD_HOST_DEVICE Number divergence_of_row(const Group& group,
                                                 const Divergence<Number>& divergence,
                                                 const TeacherRow<Number>& teacher,
                                                 const StudentRow<Number>& student,
                                                 const RowGradient<Number>& gradient) {
  for (int64_t j = teacher.count + group.lane(); j < gradient.columns; j += group.size())
    gradient.log_q[j] = 0;
  if (group.lane() == 0) *gradient.label_log_q = 0;
  if (teacher.count == 0) return 0;

  const TeacherMasses<Number> mass(group, teacher);
  const Number weight = weight_of(divergence, teacher.tau, mass.at_tau);
  Number shift = 0, log_extra = mass.tail;
  bool rest_is_extra = false, label_is_extra = false;
  switch (divergence.tail) {
    case Tail::kSampled:
      break;
    case Tail::kRenormalize:
      shift = mass.at_tau;
      break;
    case Tail::kRaw:
      shift = mass.at_tau - mass.at_one;
      break;
    case Tail::kToLabel:
      shift = mass.at_tau - mass.at_one;
      label_is_extra = mass.has_tail;
      break;
    case Tail::kDecoupled:
      shift = mass.at_tau - mass.at_one;
      rest_is_extra = mass.has_tail;
      break;
    case Tail::kGhost:
      shift = mass.has_tail ? log_add(mass.at_tau, mass.tail / teacher.tau) : mass.at_tau;
      log_extra = mass.tail / teacher.tau - shift;
      rest_is_extra = mass.has_tail;
      break;
  }

  Number loss = 0, slope_of_q = 0;
  if (rest_is_extra) {
    const Number rest = student_rest(group, student.log_q, teacher.count);
    const Term<Number> extra = term(divergence, log_extra, std::log(rest));
    loss = group.lane() == 0 ? extra.value : 0;
    slope_of_q = -extra.slope / rest;
  }
  Number label_columns = 0;
  for (int64_t j = group.lane(); j < teacher.count; j += group.size()) {
    Number log_t = teacher.log_t[j] / teacher.tau - shift;
    if (label_is_extra && teacher.ids[j] == teacher.label) {
      log_t = log_add(log_t, log_extra);
      label_columns += 1;
    }
    const Term<Number> entry = term(divergence, log_t, student.log_q[j]);
    loss += entry.value;
    const Number of_rest = rest_is_extra ? slope_of_q * std::exp(student.log_q[j]) : 0;
    gradient.log_q[j] = weight * (entry.slope + of_rest);
  }
  if (label_is_extra && group.sum(label_columns) == 0) {
    const Term<Number> label = term(divergence, log_extra, student.label_log_q);
    loss += group.lane() == 0 ? label.value : 0;
    if (group.lane() == 0) *gradient.label_log_q = weight * label.slope;
  }
  loss = group.sum(loss);
  return weight * (divergence.loss == Loss::kJsd ? loss + divergence.unit_cost() : loss);
}

// All rows of one call.
template <class Number>
struct RowProblem {
  const Number* log_q;
  int64_t log_q_stride;  // from row to row
  const Number* label_log_q;
  const int32_t* ids;
  const Number* log_t;
  const int32_t* counts;
  const int64_t* labels;
  const Number* temperatures;
  int64_t rows, columns;
  Number* loss;
  Number* grad_log_q;
  Number* grad_label_log_q;

  template <class Group>
  MEGATRON_PD_HOST_DEVICE void solve_row(const Group& group, const Divergence<Number>& divergence,
                                         int64_t row) const {
    const int64_t count = counts[row] < columns ? counts[row] : columns;
    const TeacherRow<Number> teacher{ids + row * columns, log_t + row * columns,
                                     count > 0 ? count : 0, temperatures[row], labels[row]};
    const StudentRow<Number> student{log_q + row * log_q_stride, label_log_q[row]};
    const RowGradient<Number> gradient{grad_log_q + row * columns, columns, grad_label_log_q + row};
    const Number value = divergence_of_row(group, divergence, teacher, student, gradient);
    if (group.lane() == 0) loss[row] = value;
  }
};

}  // namespace megatron_pd
