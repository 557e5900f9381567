from django.urls import path

from . import views

urlpatterns = [
    path("books/", views.books),
    path("books/later/", views.books_rendered_later),
    path("books/<int:pk>/", views.book),
    path("books/new/", views.new_book),
    path("authors/<int:pk>/", views.AuthorView.as_view()),
    path("sign-in/", views.sign_in),
    path("who/", views.who),
    path("give-back/", views.give_back),
    path("walk/", views.walk),
    path("stream/", views.stream),
    path("pause/", views.pause),
    path("sync/", views.sync_view),
]
