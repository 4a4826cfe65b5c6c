"""The door to a solution whose functions have other names and lie in other files."""

import torch

import lloyd
import method
import transformer


def attention(x, weights, n_head):
    return transformer.multi_head(x, weights, n_head)


def lora_start(n_in, n_out, rank, seed):
    torch.manual_seed(seed)
    return transformer.new_pair(n_in, n_out, rank)


def lora_linear(x, weight, bias, A, B, alpha):
    return transformer.adapted_linear(x, weight, bias, A, B, alpha)


def lora_names(n_layer, rank):
    return transformer.parameter_names(n_layer)


def lora_merged(weights, tokens, rank, alpha, merge):
    return transformer.one_block_model(weights, tokens, rank, alpha, merge)


def nearest(points, centroids):
    return lloyd.assign(points, centroids)


def cluster_centres(points, cluster, k):
    return lloyd.centre_of_each(points, cluster, k)


def kmeans(points, k, seed, chosen=None):
    start = lloyd.plus_plus(points, k, seed) if chosen is None else chosen
    return lloyd.cluster(points, start)


def kmeans_seeds(points, k, seed):
    return lloyd.plus_plus(points, k, seed)


def cluster_batches(cluster, batch_size, seed):
    return lloyd.batches_of_clusters(cluster, batch_size, seed)


def shuffled_batches(length, batch_size, seed):
    return lloyd.batches_by_length(length, batch_size, seed)


def prompt_means(tokens, start, length, prompt, document, embedding):
    return method.average_prompts(tokens, start, prompt, embedding)


def features(means, center):
    return method.on_sphere(means, center)


def cluster_means(means, count, cluster, k):
    return method.pooled(means, count, cluster, k)


def hypernetwork(statistics, start, state):
    if state is None:
        return method.Writer.untrained(statistics.shape[1], start)(statistics)
    return method.Writer.stored(state)(statistics)


def chameleon_factors(weight, rank, alpha, state, statistics):
    return method.write_factors(weight, rank, state, statistics)


def chameleon_logits(weight, rank, alpha, state, hidden, statistics):
    return method.logits(weight, rank, alpha, state, hidden, statistics)


def batch(tokens, start, length, prompt, document, index, whole):
    return method.pick_batch(tokens, start, length, prompt, index, whole)


def cut(documents, block_size):
    return method.split_documents(documents, block_size)


def losses(logits_of, tokens, targets):
    return method.summed_losses(logits_of, tokens, targets)


def controls(center, means, count, cluster, document, seed):
    return method.tell(center, means, count, cluster, document, seed)
